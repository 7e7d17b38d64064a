#!/bin/bash
# racks.sh up NAME | down NAME: the hosts NAME0 to NAME3 in two racks, as network namespaces of this machine.
# NAME0 and NAME1 share one rack's switch, NAME2 and NAME3 the other's. Each host's link carries INTRA, the link
# between the switches INTER; before each wait up to QUEUE of its rate, and what comes then is lost.
# Needs root and iproute2. Then: on NAME0 COMMAND...
set -euo pipefail
verb=$1 name=$2
switch=${name}sw
intra=${INTRA:-2gbit} inter=${INTER:-200mbit} queue=${QUEUE:-30ms}

shape() { # NAMESPACE LINK RATE BURST
  tc -netns "$1" qdisc replace dev "$2" root tbf rate "$3" burst "$4" latency "$queue"
}

# Make the two switches and the link between them.
make_switches() {
  ip netns add "$switch"
  ip -netns "$switch" link add up0 type veth peer name up1
  for rack in 0 1; do
    ip -netns "$switch" link add rack$rack type bridge
    ip -netns "$switch" link set up$rack master rack$rack
    ip -netns "$switch" link set rack$rack up
    ip -netns "$switch" link set up$rack up
    shape "$switch" up$rack "$inter" 128kb
  done
}

# Make one host, its shaped link to its rack's switch, and the names of all four.
make_host() {
  local host=$name$1 rack=$(($1 / 2))
  ip netns add "$host"
  ip link add eth0 netns "$host" type veth peer name port$1 netns "$switch"
  ip -netns "$host" address add 10.77.0.$(($1 + 1))/24 dev eth0
  ip -netns "$host" link set lo up
  ip -netns "$host" link set eth0 up
  ip -netns "$switch" link set port$1 master rack$rack
  ip -netns "$switch" link set port$1 up
  shape "$host" eth0 "$intra" 256kb
  shape "$switch" port$1 "$intra" 256kb
  mkdir -p /etc/netns/"$host"
  printf '%s\n' "127.0.0.1 localhost" "10.77.0.1 ${name}0" "10.77.0.2 ${name}1" "10.77.0.3 ${name}2" \
    "10.77.0.4 ${name}3" >/etc/netns/"$host"/hosts
}

up() {
  make_switches
  for number in 0 1 2 3; do make_host $number; done
}

down() {
  for space in "$name"{0..3} "$switch"; do
    ip netns delete "$space" 2>/dev/null || true
    rm -rf /etc/netns/"$space"
  done
}

"$verb"

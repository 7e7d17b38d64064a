#!/bin/bash
# slurm.sh up DIR PORT | down DIR: a real Slurm on this machine, with neither systemd nor cgroups.
# Its nodes node0 to node3 have 4 CPUs each; the switch rack0 joins node0-1, rack1 joins node2-3, spine the two.
# Configuration, state and logs lie in DIR; the daemons listen on PORT to PORT + 4.
# Needs root, slurm-wlm and munge. Then: SLURM_CONF=DIR/slurm.conf sbatch ...
set -euo pipefail
verb=$1 dir=$(realpath "$2") port=${3:-0}
host=$(hostname)
export SLURM_CONF=$dir/slurm.conf

configure() {
  chmod 755 "$dir"
  mkdir -p "$dir"/{state,munge} "$dir"/{spool,tmp}.node{0..3}
  chmod 700 "$dir/munge"
  head -c 128 /dev/urandom >"$dir/munge.key"
  chmod 400 "$dir/munge.key"
  echo CgroupPlugin=cgroup/v1 >"$dir/cgroup.conf"

  cat >"$dir/topology.conf" <<TOPOLOGY
SwitchName=rack0 Nodes=node[0-1]
SwitchName=rack1 Nodes=node[2-3]
SwitchName=spine Switches=rack[0-1]
TOPOLOGY

  cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
TmpFS=$dir/tmp.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=pmi2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
TopologyPlugin=topology/tree
SlurmdParameters=config_overrides
ReturnToService=2
MessageTimeout=100
KillWait=5
PropagateResourceLimits=NONE
NodeName=node[0-3] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 4))] \
CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
  configure
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munge/munged.log" --seed-file="$dir/munge/seed"
  slurmctld
  for node in node{0..3}; do slurmd -N $node; done

  for _ in {1..3000}; do
    [ "$(sinfo --noheader --Node --format=%T 2>&1 | grep -cx idle)" = 4 ] && exit
    sleep 0.1
  done
  echo "slurm.sh: the four nodes are not idle after five minutes" >&2
  tail -n 20 "$dir"/*.log >&2
  exit 1
}

down() {
  # Cancel what runs, and let the steps go before their daemons do.
  timeout 5 scancel --partition=lab 2>/dev/null || true
  for _ in {1..100}; do
    [ "$(timeout 5 squeue --noheader 2>/dev/null)" ] || break
    sleep 0.1
  done

  # End the daemons: politely, then not.
  local pids
  pids=$(cat "$dir"/*.pid 2>/dev/null || true)
  [ "$pids" ] || exit 0
  kill $pids 2>/dev/null || true
  for _ in {1..50}; do
    kill -0 $pids 2>/dev/null || exit 0
    sleep 0.1
  done
  kill -9 $pids 2>/dev/null || true
}

"$verb"

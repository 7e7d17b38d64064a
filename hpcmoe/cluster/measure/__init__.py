"""What joins the nodes, measured: pairs one by one, flows at once, in rounds of disjoint pairs."""

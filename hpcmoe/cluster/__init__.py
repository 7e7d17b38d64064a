"""Where we run: the ranks' nodes, racks and links, the groups they form, and the experts laid on them."""

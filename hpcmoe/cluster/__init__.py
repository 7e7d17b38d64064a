"""Where we run: the ranks' nodes, racks and links, and the groups they form."""

"""Local search of one layer at a time: seeds, proposals, moves and their cost, simulated annealing.

`layer_data` holds what a search looks up and changes; `moves` changes it and undoes that; `proposals` draws moves to
try; `seeds` makes first layouts, which `anneal` improves; `balance_node` evens out the ranks of a node; `memory_trades`
moves memory between layers. `warm` compiles it all with numba before any time counts.
"""

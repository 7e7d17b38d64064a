"""Lower bounds: seconds below which no placement of a layer can come.

`bounds` counts first and then asks the linear program of `linear`, whose variables `choices` lists.
"""

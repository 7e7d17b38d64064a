"""Placements and placement problems as files, ours and those of other engines.

`case` reads a problem and `checks` its numbers; `formats` reads the maps of EPLB, SGLang, vLLM and TensorRT-LLM; `maps`
checks a map against a problem and writes EPLB's.
"""

"""Measures any OpenAI-compatible endpoint.

target   what is at the URL                      prompts   texts or ids of an exact length
plan     what to send, for the load generator    serve     drives the levels, one after another
results  the JSON contract                       table     the same for eyes
offline  the Python API, without a server        kernels   each kernel, against the ceilings
floor    the least time that the ceilings of a machine allow a step of a model
"""

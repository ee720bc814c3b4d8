"""Is this machine, or this set of machines, fit to train on? Started by `arvideo doctor`.

Owns the checks and their report. Each check is a function from facts to findings; the functions
that gather the facts are beside it. Must not know recipes, tasks or the loop.
"""

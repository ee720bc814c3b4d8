"""Whether this machine, or this set of machines, is fit to train on (`arvideo doctor`).

A check is a function from facts to findings; the functions that gather the facts are beside it.
Must not know recipes, tasks or the training loop.
"""

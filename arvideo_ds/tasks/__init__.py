"""Tasks: model + objective behind one contract - a batch in, a loss out.

Owns which objective a recipe names and how clips that did not decode are left out. Must not know
DeepSpeed, ranks or the loop. A new task is a sibling of those here.
"""

# Every task keeps its model as `model`, so this is where its weights stand in the task's state.
PREFIX = "model."

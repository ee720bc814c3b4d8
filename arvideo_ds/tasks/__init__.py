"""Tasks: model + objective behind one contract - a batch in, a loss out.

Owns which objective a recipe names and how clips that did not decode are left out. Must not know
DeepSpeed, ranks or the loop. The next task (fine-tuning, detection) is a sibling of pretrain.py.
"""

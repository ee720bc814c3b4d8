"""arvideo_ds: ARVideo and its baselines, pretrained at scale with DeepSpeed.

The rooms, from low to high; imports go down this list, never up or sideways
(`make check` enforces it):

    geometry, errors, randomness   numbers and words that everybody may use
    config                         recipes, sizes, the run plan; knows no torch
    models | optim | data | engine siblings that do not know each other
    tasks                          model + objective: batch in, loss and metrics out
    evaluation                     probes, pictures, reports
    train                          the composition root and the loop
"""

__version__ = "0.1.0"

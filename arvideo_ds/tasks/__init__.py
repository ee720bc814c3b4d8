"""Tasks: a specification for each (specs/), and the modules that they train.

A module takes a batch and returns a loss. Importing a specification needs no torch. Must not know
the training loop. A new task is a recipe (config/), a specification and a module.
"""

from arvideo_ds.tasks.task import PREFIX, TASKS, Task, task_of

__all__ = ["PREFIX", "TASKS", "Task", "task_of"]

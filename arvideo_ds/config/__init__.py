"""Settings: what a run is, as data.

Owns the recipe schema, the size table, and loading with overrides.
Must not know torch, files of video, ranks or DeepSpeed: reading a recipe is instant anywhere.
"""

from arvideo_ds.config.load import load_recipe, recipe_names
from arvideo_ds.config.schema import (
    DetectRecipe,
    FinetuneRecipe,
    PretrainRecipe,
    Recipe,
    TokenizerRecipe,
)

__all__ = [
    "DetectRecipe",
    "FinetuneRecipe",
    "PretrainRecipe",
    "Recipe",
    "TokenizerRecipe",
    "load_recipe",
    "recipe_names",
]

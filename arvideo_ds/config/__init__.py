"""The recipe schema, the size table, and loading with overrides.

Must not import torch or DeepSpeed, so that reading a recipe is instant on any machine.
"""

from arvideo_ds.config.detect import DetectRecipe
from arvideo_ds.config.finetune import FinetuneRecipe
from arvideo_ds.config.load import load_recipe, recipe_names
from arvideo_ds.config.pretrain import PretrainRecipe
from arvideo_ds.config.schema import RECIPES, EncoderRecipe, Recipe
from arvideo_ds.config.tokenizer import TokenizerRecipe
from arvideo_ds.config.transfer import StartRecipe, TransferRecipe

__all__ = [
    "RECIPES",
    "DetectRecipe",
    "EncoderRecipe",
    "FinetuneRecipe",
    "PretrainRecipe",
    "Recipe",
    "StartRecipe",
    "TokenizerRecipe",
    "TransferRecipe",
    "load_recipe",
    "recipe_names",
]

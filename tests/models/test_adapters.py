"""A frozen encoder: what is trained, what it costs, and that adapters vanish on export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.data.loader import Batch
from arvideo_ds.errors import UserError
from arvideo_ds.models.classifier import Classifier
from arvideo_ds.optim.groups import parameter_groups
from arvideo_ds.planning.cost import parameter_sizes, trained_sizes
from arvideo_ds.planning.memory import Strategy, activations, model_states
from arvideo_ds.planning.plan import make_plan
from arvideo_ds.tasks import task_of
from arvideo_ds.tasks.finetune import Finetune

CLASSES = 5
Make = Callable[..., FinetuneRecipe]
HEAD: dict[str, object] = {"train": "head", "layer_decay": 1, "drop_path": 0}
CASES = [
    HEAD,
    {**HEAD, "pooling": "attention"},
    {"train": "lora"},
    {"train": "lora", "lora_rank": 3, "lora_mlp": True, "pooling": "attention"},
]


def built(recipe: FinetuneRecipe) -> Finetune:
    torch.manual_seed(0)
    module = Finetune(recipe, CLASSES)
    task_of(recipe).freeze(module)
    return module


def batch_of(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (count, 8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    numbers = torch.arange(count)
    return Batch(clips, numbers, numbers % CLASSES, numbers >= 0, first_key=3)


def draw(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize("finetune", CASES)
def test_plan_memory_and_optimiser_count_what_the_module_trains(
    finetune: dict[str, object], tiny_finetune: Make
) -> None:
    recipe = tiny_finetune(finetune={"num_classes": CLASSES, **finetune})
    module = built(recipe)
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    whole = sum(p.numel() for p in module.parameters())
    assert sorted(trained_sizes(recipe)) == sorted(trained)
    assert sum(map(sum, parameter_sizes(recipe))) == whole
    assert make_plan(recipe, world_size=1).parameters_trained == sum(trained) < whole / 3
    groups = parameter_groups(module, 0.05, layer_decay=recipe.finetune.layer_decay)
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(trained)
    for stage in range(4):
        states = model_states(recipe, Strategy(stage=stage), world_size=1)
        assert states.gradients == 4 * sum(trained), stage
        assert states.optimizer == (8 if stage == 0 else 12) * sum(trained), stage
        assert states.parameters == 4 * whole, stage


def test_training_everything_is_counted_as_before(tiny_finetune: Make) -> None:
    recipe = tiny_finetune(finetune={"num_classes": CLASSES})
    encoder, head = parameter_sizes(recipe)
    assert trained_sizes(recipe) == encoder + head
    plan = make_plan(recipe, world_size=1)
    assert "parameters_trained" not in plan.as_dict()
    assert not any("lora" in name for name in built(recipe).state_dict())


def test_a_frozen_encoder_keeps_no_activations(tiny_finetune: Make) -> None:
    full, head = (activations(tiny_finetune(finetune=f), 8) for f in ({}, HEAD))
    assert head.saved == 0 < full.saved
    assert head.peak < full.peak / 2


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("mlp", [False, True])
def test_merged_adapters_give_the_same_logits(mlp: bool, pooling: str, tiny_finetune: Make) -> None:
    lora = {"train": "lora", "lora_mlp": mlp, "pooling": pooling, "lora_alpha": 24}
    recipe = tiny_finetune(finetune={**lora, "lora_dropout": 0.5})
    module = built(recipe).eval()
    plain = Classifier(recipe.encoder, CLASSES, pooling=pooling)
    clips = batch_of().clips
    state = module.model.state_dict()
    base = {name: value for name, value in state.items() if "lora" not in name}
    plain.load_state_dict(base)
    draw([module.model.head.weight, plain.head.weight])
    plain.head.weight.data.copy_(module.model.head.weight)
    assert torch.equal(plain.eval()(clips), module.model(clips)), "adapters start at zero"
    draw([p for name, p in module.named_parameters() if "lora" in name])
    adapted = module.model(clips)
    assert (adapted - plain(clips)).abs().max() > 0.01, "adapters matter"
    plain.load_state_dict(task_of(recipe).exported(module.model.state_dict(), {}))
    assert (adapted - plain(clips)).abs().max() <= 1e-5


@pytest.mark.parametrize("finetune", CASES)
def test_only_trained_weights_have_gradients(
    finetune: dict[str, object], tiny_finetune: Make
) -> None:
    module = built(tiny_finetune(finetune=finetune))
    draw([module.model.head.weight, *(p for n, p in module.named_parameters() if "lora" in n)])
    module(batch_of()).backward()
    for name, parameter in module.named_parameters():
        outside = not name.startswith("model.encoder.")
        assert parameter.requires_grad == (outside or "lora" in name), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_frozen_encoder_is_in_evaluation_mode_while_the_head_trains(tiny_finetune: Make) -> None:
    module = built(tiny_finetune(finetune=HEAD))
    assert module.training and module.model.head.training
    assert not any(part.training for part in module.model.encoder.modules())
    module.eval()
    assert not module.train().model.encoder.training
    lora = built(tiny_finetune(finetune={"train": "lora"}))
    assert lora.model.encoder.training, "adapted layers keep their stochastic depth"


def test_adapters_compile_in_one_graph(tiny_finetune: Make) -> None:
    module = built(tiny_finetune(finetune={"train": "lora", "drop_path": 0})).model.encoder
    layer = module.blocks[0].attn
    x = torch.randn(2, 6, 128)
    fast = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(fast(x), layer(x))


@pytest.mark.parametrize(
    ("finetune", "words"),
    [
        ({"train": "head", "drop_path": 0}, "Set finetune.layer_decay=1.0"),
        ({"train": "head", "layer_decay": 1}, "Set finetune.drop_path=0.0"),
        ({**HEAD, "lora_rank": 4}, "finetune.lora_rank=4 would have no effect"),
        ({"lora_dropout": 0.1}, "Set finetune.lora_dropout=0.0"),
        ({"train": "adapters"}, "finetune.train"),
    ],
)
def test_settings_without_effect_are_refused(
    finetune: dict[str, object], words: str, tiny_finetune: Make
) -> None:
    with pytest.raises(UserError) as refused:
        tiny_finetune(finetune=finetune)
    assert words in str(refused.value)


def test_adapters_need_layers_of_their_names(tiny_finetune: Make) -> None:
    recipe = tiny_finetune(finetune={"train": "lora"})
    module = Finetune(recipe, CLASSES)
    module.model.encoder.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UserError, match="linear layers named qkv, proj"):
        task_of(recipe).freeze(module)


@pytest.mark.parametrize(
    ("finetune", "words"),
    [(HEAD, "encode all tokens"), ({"train": "lora", "lora_dropout": 0.1}, "drop the same")],
)
def test_sequence_parallelism_that_would_not_share_is_refused(
    finetune: dict[str, object], words: str, tiny_finetune: Make
) -> None:
    recipe = tiny_finetune(finetune=finetune)
    plan = make_plan(recipe, world_size=2, sequence_parallel=2)
    with pytest.raises(UserError, match=words):
        task_of(recipe).check(plan, None, None)


def test_a_frozen_random_encoder_is_noted(tiny_finetune: Make) -> None:
    assert any("--init-from" in note for note in tiny_finetune(finetune=HEAD).notes())
    assert not tiny_finetune(finetune={**HEAD, "init_from": "runs/x"}).notes()
    assert not tiny_finetune().notes()

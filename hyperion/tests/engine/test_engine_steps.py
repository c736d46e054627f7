"""One optimizer step is what it should be, whatever the batch, the accumulation or the precision."""

from __future__ import annotations

import math

import pytest
import torch
from hyperion_core.config import PluginConfig
from hyperion_core.errors import TrainingError
from hyperion_core.facts import ParamGroup
from hyperion_core.kinds import Adapter, Objective
from transformers import Trainer, TrainerCallback, TrainingArguments

from hyperion.data.collate import Collator
from hyperion.engine.arguments import training_arguments
from hyperion.engine.batches import Batching
from hyperion.engine.engine import Engine
from hyperion.engine.interruption import Interruption
from hyperion.engine.loss import supervised_logprobs
from hyperion.engine.sampler import EpochSampler


class FirstStep(TrainerCallback):
    """Keeps the gradients of the first optimizer step, and ends the run."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        control.should_training_stop = True


def engine_of(run, model, adapter="lowrank", objective="mean", capacity=None, **changes):
    callback = FirstStep()
    arguments = {**run.arguments, "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "logging_steps": 1}
    engine = Engine(
        model, training_arguments({**arguments, "save_strategy": "no", **changes}), hooks=run.hooks, ctx=run.ctx,
        adapter=(adapter, run.config), objective=(objective, PluginConfig()),
        scheduler=("linear", PluginConfig()), train=run.train, evaluation=run.evaluation,
        batching=Batching(Collator(0), capacity), callbacks=[callback], interruption=Interruption(),
    )  # fmt: skip
    return engine, callback


def first_step(run, model=None, **changes):
    engine, callback = engine_of(run, model or run.model(), **changes)
    engine.train()
    return callback.gradients, engine.state.log_history[0]["loss"]


def assert_equal(mine, expected):
    assert mine.keys() == expected.keys()
    assert mine
    for name, gradient in expected.items():
        assert torch.norm(mine[name] - gradient) <= 1e-5 * torch.norm(gradient), name


def test_accumulating_four_batches_of_two_is_one_batch_of_eight(tiny, tmp_path):
    run = tiny.Run(tmp_path, train=tiny.rows(8, longest=30))
    split, split_loss = first_step(run, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    whole, whole_loss = first_step(run, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    assert_equal(split, whole)
    assert split_loss == pytest.approx(whole_loss, rel=1e-5)


class Peft(Adapter):
    """As thin as can be: what plain peft does, behind the hooks that the engine calls."""

    def adapter_param_groups(self, model, name, config):
        return [ParamGroup("all", tuple((n, p) for n, p in model.named_parameters() if p.requires_grad))]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_first_step_equals_plain_transformers_and_peft(tiny, tmp_path, seed):
    from peft import LoraConfig, get_peft_model

    def lora():
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(tiny.llama(seed), config)

    run = tiny.Run(tmp_path, train=tiny.rows(8, seed=seed))
    run.hooks.add(Peft(), "peft")
    mine, my_loss = first_step(run, lora(), adapter="peft", gradient_accumulation_steps=2)

    callback = FirstStep()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.0,
        train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    plain = Trainer(
        lora(), arguments, data_collator=Collator(0), train_dataset=run.train.remove_columns("length"),
        callbacks=[callback],
    )  # fmt: skip
    plain.train()
    assert_equal(mine, callback.gradients)
    assert my_loss == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-5)


def test_recomputing_activations_changes_no_gradient(tiny, tmp_path):
    run = tiny.Run(tmp_path)
    plain, _ = first_step(run)
    for reentrant in (False, True):
        again, _ = first_step(
            run, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        assert_equal(again, plain)


def test_bf16_computes_in_bf16_and_gives_the_model_back_as_it_came(tiny, tmp_path):
    run = tiny.Run(tmp_path, bf16=True, gradient_checkpointing=True)
    model = run.model()
    types = set()
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda m, a, out: types.add(out.dtype) if m.training else None
    )
    model.config.use_cache = True
    result = run.fit(model=model, fused_layers=False)  # whose trial is in float32
    assert types == {torch.bfloat16}
    assert "forward" not in vars(result.model)
    assert result.model.config.use_cache is True
    assert not any(getattr(module, "gradient_checkpointing", False) for module in result.model.modules())
    assert not result.model.get_input_embeddings()._forward_hooks
    assert math.isfinite(result.metrics["train_loss"])
    assert all(p.dtype == torch.float32 for p in run.trained(model).values())


def test_neftune_is_felt_in_training_and_gone_afterwards(tiny, tmp_path):
    run = tiny.Run(tmp_path)
    plain, _ = first_step(run)
    model = run.model()
    noisy, _ = first_step(run, model, neftune_noise_alpha=5.0)
    name = next(iter(plain))
    assert not torch.allclose(plain[name], noisy[name])
    assert not model.get_input_embeddings()._forward_hooks


def test_parameter_groups_carry_their_own_learning_rate_and_decay(tiny, tmp_path):
    run = tiny.Run(tmp_path, config=tiny.LowRankConfig(lr_ratio=16.0), weight_decay=0.1)
    engine, _ = engine_of(run, run.model())
    groups = engine.create_optimizer().param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(5e-3, 0.1), (0.08, 0.0)]


def test_an_adapter_that_leaves_a_trainable_out_of_its_groups_is_refused(tiny, tmp_path):
    run = tiny.Run(tmp_path)
    model = run.model()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"(?s)parameter groups.*left out: lm_head\.weight"):
        engine_of(run, model)[0].create_optimizer()


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_step(tiny, tmp_path):
    run = tiny.Run(tmp_path)
    model = run.model()
    with torch.no_grad():
        run.adapter.adapter_param_groups(model=model, name="default", config=run.config)[0].parameters[0][1].fill_(
            float("nan")
        )
    with pytest.raises(TrainingError, match=r"(?s)the loss is nan at optimizer step 1.*learning_rate") as caught:
        run.fit(model=model)
    assert "--resume" not in str(caught.value)  # it refuses a changed config


def test_the_adapters_own_loss_and_its_turn_after_each_step(tiny, tmp_path):
    calls = []

    def penalty(self, model, name):
        return sum(m.lowrank_a.square().sum() for m in self.modules(model).values())

    def after_step(self, model, name, step, total):
        # AdaLoRA reads gradients here: they must still be there
        assert all(m.lowrank_a.grad is not None for m in self.modules(model).values())
        calls.append((step, total))

    run = tiny.Run(tmp_path, train=tiny.rows(8), max_steps=2)
    plain, plain_loss = first_step(run, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    model = run.model()
    expected = {n: g + 2 * dict(model.named_parameters())[n].detach() * n.endswith("_a") for n, g in plain.items()}
    more = {"adapter_loss": penalty, "adapter_after_step": after_step}
    run.hooks.add(type("Penalised", (tiny.LowRank,), more)(), "penalised")
    found, loss = first_step(
        run, model, adapter="penalised", per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert_equal(found, expected)
    assert loss - plain_loss == pytest.approx(float(penalty(tiny.LowRank(), run.model(), "").detach()), rel=1e-4)
    assert calls == [(1, 2)]


def test_an_objective_may_compare_with_the_base(tiny, tmp_path):
    seen = []

    class Compare(Objective):
        def objective_sequences(self, config, row):
            return []

        def objective_needs_reference(self, config):
            return True

        def objective_loss(self, config, logps, segments, reference, normalizer):
            seen.append((segments.token.clone(), reference))
            return (reference - logps).sum() / normalizer, {}

    run = tiny.Run(tmp_path, train=tiny.rows(2), config=tiny.LowRankConfig(dropout=0.5))
    run.hooks.add(Compare(), "compare")
    base_model = tiny.llama(attention_dropout=0.5)
    model = run.adapter.adapter_apply(model=base_model, name="default", config=run.config, ctx=run.ctx)
    gradients, _ = first_step(run, model, objective="compare")
    token, reference = seen[0]
    base = supervised_logprobs(tiny.llama(), Collator(0)(list(run.train)))
    assert torch.equal(token, base.token)
    torch.testing.assert_close(reference, base.logps.detach())
    assert not reference.requires_grad
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("batch", [2, 16])  # neither divides the rows: dataloader_drop_last must not reach them
def test_evaluation_weighs_tokens_not_batches(tiny, tmp_path, batch):
    rows = tiny.rows(9, seed=8, longest=30)
    run = tiny.Run(tmp_path, evaluation=rows, per_device_eval_batch_size=batch, dataloader_drop_last=True)
    model = run.model()
    engine, _ = engine_of(run, model)
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logs = model(ids).logits[0, :-1].detach().log_softmax(-1)
        learnt = labels != -100
        total -= float(logs[learnt].gather(1, labels[learnt, None]).sum())
        count += int(learnt.sum())
    assert engine.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_evaluation_with_nothing_to_predict_is_no_perfect_loss(tiny, tmp_path):
    rows = tiny.rows(3).map(lambda row: {"labels": [-100] * row["length"]})
    run = tiny.Run(tmp_path, evaluation=rows)
    with pytest.raises(TrainingError, match=r"(?s)no token to predict.*3 rows"):
        engine_of(run, run.model())[0].evaluate()


def test_dropping_the_only_batch_is_refused_before_anything_is_written(tiny, tmp_path):
    run = tiny.Run(tmp_path / "out", train=tiny.rows(3), per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(TrainingError, match="3 rows, fewer than one batch of 4"):
        run.fit()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you …"),
    ],
)
@pytest.mark.parametrize("packing, said", [(False, r"batch_size \(2\).*steps \(2\)"), (None, "pack_length below 1024")])
def test_memory_that_runs_out_names_the_options_that_save_it(tiny, tmp_path, error, packing, said):
    run = tiny.Run(tmp_path)
    model = run.model()

    def refuse(module, arguments):
        raise error

    model.model.layers[1].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(TrainingError, match=f"(?s)cpu ran out of memory.*{said}") as caught:
        run.fit(model=model, packing=packing)
    assert caught.value.__cause__ is error
    with pytest.raises(TrainingError) as caught:
        run.fit(model=model, packing=packing, pack_length=1)  # a pack holds the longest row whatever is asked
    assert "pack_length" not in caught.value.fix


def test_evaluating_more_often_trains_the_same_adapter(tiny, tmp_path):
    config = tiny.LowRankConfig(dropout=0.2)
    plain = tiny.Run(tmp_path / "a", config=config)
    watched = tiny.Run(tmp_path / "b", config=config, evaluation=tiny.rows(5), eval_strategy="steps", eval_steps=1)
    expected, found = plain.trained(plain.fit().model), watched.trained(watched.fit(samples=2).model)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_data_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch, strategy="random", **more):
        sampler = EpochSampler(400, seed=seed, strategy=strategy, **more)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 0)) == list(range(400))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert order(1, 3, "sequential") == list(range(400))
    lengths = [7 * i % 50 for i in range(400)]
    grouped = order(1, 0, "group_by_length", lengths=lengths, group=5)
    steps = [[lengths[row] for row in grouped[start : start + 5]] for start in range(0, 400, 5)]
    spread = [max(step) - min(step) for step in steps]
    assert sorted(grouped) == list(range(400))
    assert sum(spread) / len(spread) < 5  # of 50 lengths, those of one step lie close together
    assert grouped != order(1, 1, "group_by_length", lengths=lengths, group=5)

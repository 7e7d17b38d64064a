"""The auxiliary loss of a spread model is that of all ranks' tokens, and no other model's has changed."""

import copy
import functools
import inspect

import pytest
import torch
from spreading import (
    CLOSE,
    LENGTH,
    SEQUENCES,
    assert_close,
    compare_gradients,
    draw_ids,
    make_whole,
    open_group,
    place_unevenly,
    split_by_rank,
)
from spreading import call as call_model
from tiny_families import make_model
from torch import nn

import hpcmoe
from hpcmoe.errors import ConfigError
from hpcmoe.model.hf.aux_loss import bind_class, bind_function, find_owner
from hpcmoe.model.hf.spread import TESTED

pytest.importorskip("transformers", reason="needs transformers: pip install 'hpcmoe[hf]'")

WITHOUT = {"deepseek_v2", "deepseek_v3", "glm4_moe"}
BALANCED = [family for family in TESTED if family not in WITHOUT]
MORE = (
    "minimax", "minimax_m2", "flex_olmo", "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "mellum", "laguna",
    "dbrx", "jetmoe", "flint",
)  # fmt: skip


def draw_mask(ids, empty=()):
    """Draw which tokens count: sequences padded to the left by unlike lengths, those in empty whole."""
    dropped = torch.tensor([LENGTH if row in empty else row % 4 for row in range(len(ids))])
    return (torch.arange(LENGTH) >= dropped[:, None]).long()


def call(model, ids, all_ids, **more):
    return call_model(model, ids, all_ids, output_router_logits=True, **more)


def compare_losses(comm, output, wanted):
    """Compare the sums over ranks of both losses with those of the whole batch."""
    for name in ("loss", "aux_loss"):
        found = comm.allreduce(getattr(output, name).item())
        assert found == pytest.approx(getattr(wanted, name).item(), rel=CLOSE), name


def compare_balanced_step(comm, group, family, mask=None, prepare=lambda model: None, **options):
    """Compare a step of a spread model with one of the whole, by its loss, auxiliary loss and gradients."""
    all_ids, ids = draw_ids(comm)
    masks = [{}, {}] if mask is None else [{"attention_mask": mask}, {"attention_mask": split_by_rank(comm, mask)}]
    whole, model = make_whole(family), hpcmoe.hf.spread(make_model(family), group, **options)
    outputs = []
    for each, own, kept in ((whole, all_ids, masks[0]), (model, ids, masks[1])):
        each.router_aux_loss_coef = 1.0  # by default it is next to nothing in most families
        prepare(each)
        outputs.append(call(each, own, all_ids, **kept))
        outputs[-1].loss.backward()
    group.sum_gradients(model)
    compare_losses(comm, outputs[1], outputs[0])
    compare_gradients(comm, model, whole)
    return model


@pytest.mark.mpi
@pytest.mark.parametrize("family", [*BALANCED, *(pytest.param(family, marks=pytest.mark.full) for family in MORE)])
def test_losses_and_gradients_are_those_of_the_whole_batch(comm, family):
    with open_group(comm) as group:
        compare_balanced_step(comm, group, family, draw_mask(draw_ids(comm)[0]))


@pytest.mark.mpi
def test_without_a_mask_all_tokens_count_wherever_experts_are(comm):
    with open_group(comm, 4) as group:
        compare_balanced_step(comm, group, "mixtral", placement=place_unevenly(comm.size))
    with open_group(comm, tensor_parallel=comm.size) as group:
        compare_balanced_step(comm, group, "mixtral")


@pytest.mark.mpi
def test_a_rank_of_which_no_token_counts_adds_nothing(comm):
    all_ids = draw_ids(comm)[0]
    empty = range(len(all_ids))[-SEQUENCES[comm.size - 1] :] if comm.size > 1 else ()
    with open_group(comm) as group:
        compare_balanced_step(comm, group, "qwen3_moe", draw_mask(all_ids, empty))
        model = hpcmoe.hf.spread(make_model("qwen3_moe"), group)
        mask = torch.zeros_like(draw_ids(comm)[1])
        assert call(model, draw_ids(comm)[1], all_ids, attention_mask=mask).aux_loss.item() == 0  # of no token at all


@pytest.mark.mpi
def test_gradient_checkpointing_changes_no_loss(comm):
    def checkpoint(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})

    with open_group(comm) as group:
        compare_balanced_step(comm, group, "olmoe", draw_mask(draw_ids(comm)[0]), checkpoint)


@pytest.mark.mpi
@pytest.mark.parametrize("schedule", ["overlap", "arrival"])
def test_each_micro_batch_has_the_loss_of_its_tokens_on_all_ranks(comm, schedule):
    with open_group(comm, schedule=schedule, deterministic=schedule == "overlap") as group:
        all_ids, ids = draw_ids(comm, (5,))
        mask = draw_mask(all_ids)
        whole, model = make_whole("mixtral"), hpcmoe.hf.spread(make_model("mixtral"), group)
        for each in (whole, model):
            each.router_aux_loss_coef = 1.0

        def step(sequences):
            own_mask = mask[comm.rank * 5 : comm.rank * 5 + 5]
            loss = call(model, ids[sequences], all_ids, attention_mask=own_mask[sequences]).loss
            loss.backward()
            return loss.detach()

        parts = torch.arange(5).split([1, 2, 1, 1])
        losses = list(group.lanes(step, parts))
        group.sum_gradients(model)
        for part, loss in zip(parts, losses, strict=True):
            rows = torch.cat([part + 5 * rank for rank in range(comm.size)])
            wanted = call(whole, all_ids[rows], all_ids, attention_mask=mask[rows]).loss
            wanted.backward()
            assert comm.allreduce(loss.item()) == pytest.approx(wanted.item(), rel=CLOSE)
        compare_gradients(comm, model, whole)


@pytest.mark.mpi
def test_other_models_of_the_process_keep_their_own_loss(comm):
    with open_group(comm) as group:
        all_ids, ids = draw_ids(comm)
        model, whole = hpcmoe.hf.spread(make_model("mixtral"), group), make_whole("mixtral")
        of_model = type(model)
        assert issubclass(of_model, type(whole)) and of_model.__name__ == type(whole).__name__
        assert inspect.signature(model.forward) == inspect.signature(whole.forward)
        shared = call(model, ids, all_ids).aux_loss
        if comm.rank == 0:  # alone: a sum over ranks would wait for ever
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            logits = call(whole, ids, all_ids)
            wanted = load_balancing_loss_func(logits.router_logits, 8, 2, None)
            assert logits.aux_loss.item() == wanted.item() and type(whole) is not of_model
        # A copy is a spread model too, and so is what looks at losses alone.
        with torch.no_grad():
            assert_close(call(copy.deepcopy(model), ids, all_ids).aux_loss, shared, "of a copy")
            assert_close(call(model, ids, all_ids, labels=None).aux_loss, shared, "without labels")


@pytest.mark.mpi
def test_a_subclass_that_calls_its_bases_forward_shares_its_loss_too(comm):
    with open_group(comm) as group:
        all_ids, ids = draw_ids(comm)
        wanted = call(make_whole("mixtral"), all_ids, all_ids)
        model = make_model("mixtral")

        class Own(type(model)):
            def forward(self, **arguments):
                return super().forward(**arguments)

        model.__class__ = Own
        compare_losses(comm, call(hpcmoe.hf.spread(model, group), ids, all_ids), wanted)


@pytest.mark.mpi
def test_a_forward_that_cannot_be_given_the_loss_is_one_line(comm):
    with open_group(comm) as group:
        model = make_model("mixtral")
        model.forward = functools.partial(model.forward)
        with pytest.raises(ConfigError, match=r"MixtralForCausalLM.forward is replaced: spread the model before"):
            hpcmoe.hf.spread(model, group)
        model = make_model("mixtral")
        whole = type(model).forward

        class Own(type(model)):
            def forward(self, *args, **kwargs):
                return type(model).forward(self, *args, **kwargs)

            forward.__wrapped__ = whole

        model.__class__ = Own
        with pytest.raises(ConfigError, match=r"Own.forward wraps a forward\(\) in a way that is not known"):
            hpcmoe.hf.spread(model, group)


@pytest.mark.parametrize("family", TESTED)
def test_families_with_the_loss_are_bound_to_it_and_the_others_left(family):
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    assert (find_owner(cls) is None) == (family in WITHOUT) and find_owner(nn.Linear) is None
    if family not in WITHOUT:
        own, loss = inspect.unwrap(cls.forward), object()
        bound = inspect.unwrap(bind_class(cls, loss).forward)
        assert bound.__code__ is own.__code__ and bound.__globals__["load_balancing_loss_func"] is loss
        assert own.__globals__["load_balancing_loss_func"] is not loss


def test_a_bound_function_keeps_what_it_was_called_with():
    def double(function):
        @functools.wraps(function)
        def twice(*args, **kwargs):
            return 2 * function(*args, **kwargs)

        return twice

    @double
    @double
    def scale(x, *, by=3):
        """Scale."""
        return len(x) * by

    bound = bind_function(scale, {"len": lambda x: 5})
    assert (bound("ab"), bound("ab", by=1)) == (60, 20)
    assert (bound.__doc__, bound.__name__, inspect.signature(bound)) == ("Scale.", "scale", inspect.signature(scale))
    assert scale("abc", by=1) == 12

"""What a user would pick instead: the same layer by torch.distributed, Hugging Face, DeepSpeed and Megatron-Core.

Each is opened on a group of ranks with the same weights, takes the tokens of its rank, and gives norm, experts and
residual as hpcmoe's layer does. Their transport is gloo, the one that all of them have without GPUs.
"""

import contextlib
import ctypes
import logging
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from hpcmoe.wait import broadcast

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_memory():
    """Tell malloc to take no memory by mmap and to give none back."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def open_gloo(group):
    """Open torch.distributed over gloo among the ranks of a group. Collective over group."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if group.rank == 0 else None
    port = broadcast(group, store and store.port)
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)


class Rival:
    """A layer of someone else's: y = x + moe(norm(x))."""

    alone = False  # whether one process does the work of all ranks

    def __init__(self, shape, router_weight, expert_weights):
        """router_weight [E, H] float32; expert_weights(e) -> dict up [F, H], down [H, F] float32. Collective."""
        self.shape, self.dtype = shape, getattr(torch, shape.dtype)
        self.moe = self.open(router_weight, expert_weights)
        self.moe.train(shape.training)

    def local_experts(self):
        """List the experts of this rank."""
        first = dist.get_rank() * self.shape.experts_of_rank
        return range(first, first + self.shape.experts_of_rank)

    def open(self, router_weight, expert_weights):
        """Build the layer -> Module that maps tokens [T, H] to what is added to the residual [T, H]."""
        raise NotImplementedError

    def rise(self, x):
        """x [T, H] float32 -> y [T, H]."""
        return x + self.moe(x).float()

    def forward(self, x):
        """x [T, H] float32 -> y [T, H], nothing kept."""
        with torch.no_grad():
            return self.rise(x)

    def train(self, x, grad):
        """Go up from x [T, H] and down from the gradient of y -> gradient of x; weights get gradients of their own."""
        self.moe.zero_grad(set_to_none=True)
        x = x.detach().requires_grad_()
        self.rise(x).backward(grad)
        return x.grad


class Expert(nn.Module):
    """Two matrices and a gelu, as torch has them."""

    def __init__(self, weights, dtype):
        super().__init__()
        self.up, self.down = (nn.Parameter(weights[name].to(dtype)) for name in ("up", "down"))

    def forward(self, x):
        """x [..., H] -> [..., H]."""
        return functional.linear(functional.gelu(functional.linear(x, self.up)), self.down)


class AllToAllSingle(Rival):
    """torch.distributed's all_to_all_single, and a loop over experts."""

    name = "all_to_all_single"

    def open(self, router_weight, expert_weights):
        """Build the layer that one writes oneself."""
        experts = [Expert(expert_weights(expert), self.dtype) for expert in self.local_experts()]
        return TorchLayer(router_weight, experts, self.shape.top_k, self.dtype)


class TorchLayer(nn.Module):
    """Rows sorted by expert, one all_to_all_single there and one back."""

    def __init__(self, router_weight, experts, top_k, dtype):
        super().__init__()
        self.router, self.experts = nn.Parameter(router_weight.clone()), nn.ModuleList(experts)
        self.top_k, self.dtype = top_k, dtype

    def forward(self, x):
        """x [T, H] -> [T, H]."""
        logits, chosen = functional.linear(x, self.router).topk(self.top_k, dim=-1)
        order = chosen.flatten().argsort(stable=True)
        sent = torch.bincount(chosen.flatten(), minlength=len(self.router)).view(dist.get_world_size(), -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)

        # There, through the experts one after the other, and back.
        token = order // self.top_k
        rows = Carry.apply(x.to(self.dtype)[token], sent, received)
        pieces = rows.split(received.flatten().tolist())  # by rank, then by expert
        results = [None] * len(pieces)
        for number, expert in enumerate(self.experts):
            mine = pieces[number :: len(self.experts)]
            results[number :: len(self.experts)] = expert(torch.cat(mine)).split([len(piece) for piece in mine])
        rows = Carry.apply(torch.cat(results), received, sent)

        gates = logits.softmax(dim=-1).flatten()[order]
        return torch.zeros_like(x).index_add(0, token, rows * gates[:, None])


class Carry(torch.autograd.Function):
    """One all_to_all_single of rows; backward the counts change places."""

    @staticmethod
    def forward(ctx, rows, send_counts, recv_counts):
        """Exchange rows [n, H] by counts [P, s] -> rows [m, H]."""
        ctx.counts = send_counts, recv_counts
        send, recv = send_counts.sum(dim=1).tolist(), recv_counts.sum(dim=1).tolist()
        arrived = rows.new_empty(sum(recv), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), recv, send)
        return arrived

    @staticmethod
    def backward(ctx, grads):
        """Exchange gradients [m, H] the other way -> gradients [n, H]."""
        send_counts, recv_counts = ctx.counts
        return Carry.apply(grads, recv_counts, send_counts), None, None


class HuggingFace(Rival):
    """Hugging Face's eager block, in one process with as many threads as the others have ranks."""

    name = "Hugging Face eager, 1 process"
    alone = True

    def open(self, router_weight, expert_weights):
        """Build it of Mixtral's router and the experts without a gate matrix of Nemotron-H."""
        from transformers import MixtralConfig, NemotronHConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        shape = self.shape
        sizes = {"hidden_size": shape.hidden, "num_experts_per_tok": shape.top_k}
        router = MixtralTopKRouter(MixtralConfig(num_local_experts=shape.experts, **sizes))
        config = NemotronHConfig(
            n_routed_experts=shape.experts, moe_intermediate_size=shape.feed_forward, mlp_hidden_act="gelu", **sizes
        )
        config._experts_implementation = "eager"
        experts = NemotronHExperts(config).to(self.dtype)
        with torch.no_grad():
            router.weight.copy_(router_weight)
            for expert in range(shape.experts):
                weights = expert_weights(expert)
                experts.up_proj[expert].copy_(weights["up"])
                experts.down_proj[expert].copy_(weights["down"])
        return HuggingFaceBlock(router, experts, shape.ranks, self.dtype)


class HuggingFaceBlock(nn.Module):
    """Router and experts as Mixtral's block joins them."""

    def __init__(self, router, experts, num_threads, dtype):
        super().__init__()
        self.router, self.experts = router, experts
        self.num_threads, self.dtype = num_threads, dtype

    def forward(self, x):
        """x [T, H] -> [T, H]."""
        torch.set_num_threads(self.num_threads)
        _, gates, chosen = self.router(x)
        return self.experts(x.to(self.dtype), chosen, gates)


class DeepSpeed(Rival):
    """DeepSpeed's MoE."""

    name = "DeepSpeed"

    def open(self, router_weight, expert_weights):
        """Build it without drops and without noise."""
        import deepspeed
        from deepspeed.moe.layer import MoE

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed("gloo", dist_init_required=False, verbose=False)
        shape = self.shape
        layer = MoE(
            shape.hidden, Expert(expert_weights(0), self.dtype), shape.experts, shape.ranks, k=shape.top_k,
            drop_tokens=False, min_capacity=0, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        layer.set_deepspeed_parallelism()
        with torch.no_grad():
            layer.deepspeed_moe.gate.wg.weight.copy_(router_weight)
            for mine, expert in zip(layer.deepspeed_moe.experts.deepspeed_experts, self.local_experts(), strict=True):
                mine.load_state_dict(expert_weights(expert))
        return Adapter(layer, self.dtype)


class Megatron(Rival):
    """Megatron-Core's MoE layer with its alltoall dispatcher."""

    name = "Megatron-Core"

    def open(self, router_weight, expert_weights):
        """Build it of its own parts, without Transformer Engine; what it asks of CUDA is answered by the host."""
        stand_in_for_cuda()
        from megatron.core import parallel_state
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.transformer.moe import moe_utils, token_dispatcher
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        shape = self.shape
        moe_utils.te_general_gemm = None  # 0.16.1 asks for it where Transformer Engine is not installed
        token_dispatcher.MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = torch.cuda.current_stream()
        token_dispatcher.maybe_move_tensor_to_cpu = move_to_host
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(expert_model_parallel_size=shape.ranks)
        config = TransformerConfig(
            num_layers=1, hidden_size=shape.hidden, num_attention_heads=16, ffn_hidden_size=shape.feed_forward,
            num_moe_experts=shape.experts, moe_router_topk=shape.top_k, moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0, moe_token_dispatcher_type="alltoall", moe_router_dtype="fp32",
            expert_model_parallel_size=shape.ranks, add_bias_linear=False, activation_func=functional.gelu,
            params_dtype=self.dtype, bf16=self.dtype == torch.bfloat16, use_cpu_initialization=True,
            perform_initialization=False, bias_activation_fusion=False, gradient_accumulation_fusion=False,
        )  # fmt: skip
        layer = build_module(get_moe_module_spec(use_te=False, num_experts=shape.experts), config)
        with torch.no_grad():
            layer.router.weight.data = router_weight.clone()
            for mine, expert in zip(layer.experts.local_experts, self.local_experts(), strict=True):
                weights = expert_weights(expert)
                mine.linear_fc1.weight.copy_(weights["up"])
                mine.linear_fc2.weight.copy_(weights["down"])
        return Adapter(layer, self.dtype)


class Adapter(nn.Module):
    """Gives a layer its tokens in its precision as sequences [T, 1, H], and takes the first of what it returns."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x):
        """x [T, H] -> [T, H]."""
        return self.layer(x.to(self.dtype)[:, None])[0][:, 0]


def stand_in_for_cuda():
    """Let the host answer what Megatron-Core asks of torch.cuda; its streams have nothing to wait for."""
    event = types.SimpleNamespace(synchronize=lambda: None)
    stream = types.SimpleNamespace(record_event=lambda: event)
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def move_to_host(tensor, as_numpy=False, record_stream=False):
    """Do for a tensor that is on the host what Megatron-Core does for one on a GPU alone: give counts as an array."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


RIVALS = (AllToAllSingle, HuggingFace, DeepSpeed, Megatron)

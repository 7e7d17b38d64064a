"""Mixture-of-experts models of Hugging Face transformers, their experts spread over a group's ranks.

    with hpcmoe.open() as group:
        model = hpcmoe.hf.spread(AutoModelForCausalLM.from_config(config), group)
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=tokens_of_all_ranks).loss
        loss.backward()
        group.sum_gradients(model)

Routers, shared experts and all else stay the family's own, whole on each rank; each rank has batches of its own. The
experts are reached through transformers' registry of experts functions, and compute by the family's own arithmetic.
"""

from hpcmoe.model.hf.distributed import register as register
from hpcmoe.model.hf.load import load as load
from hpcmoe.model.hf.load import prepare_load as prepare_load
from hpcmoe.model.hf.save import save as save
from hpcmoe.model.hf.spread import TESTED as TESTED
from hpcmoe.model.hf.spread import spread as spread

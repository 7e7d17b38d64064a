"""A layer's stages done by hand, one after the other, as the engine does the one lane of a serial schedule."""

from hpcmoe.wait import Backoff


def finish(dispatcher, pieces):
    """Do a stage to its end, letting messages progress."""
    backoff = Backoff()
    moved = dispatcher.poke()
    for worked in pieces:
        if worked or moved:
            backoff.reset()
        else:
            dispatcher.wait_for_change(backoff)
        moved = dispatcher.poke()


def return_rows(dispatcher, handle):
    """Return rows as they come, as experts would that do nothing: a stage in place of `compute`."""
    for batch in dispatcher.receive(handle):
        if batch is None:
            yield False
            continue
        for chunk in dispatcher.split(handle, batch):
            rows, _ = dispatcher.gather(chunk.rows)
            dispatcher.scatter(rows, chunk.rows)
            yield True
        dispatcher.return_batch(handle, batch)


def wait_results(dispatcher, handle):
    """Wait until all rows are home: a stage in place of `combine`, which then sums them."""
    while not dispatcher.poll_results(handle):
        yield False


def serve(dispatcher):
    """Wait until nothing is left to do for others, who may wait for what this rank receives: a stage after the last."""
    while not dispatcher.is_idle:
        yield False


def carry(layer, context):
    """Dispatch a routed micro-batch, and have its rows come home from experts who do nothing."""
    finish(layer.dispatcher, layer.dispatch(context))
    finish(layer.dispatcher, return_rows(layer.dispatcher, context.handle))
    finish(layer.dispatcher, wait_results(layer.dispatcher, context.handle))
    finish(layer.dispatcher, serve(layer.dispatcher))

"""A layer's stages done by hand, one after the other, as the engine does the one lane of a serial schedule."""

from hpcmoe.wait import Backoff


def finish(dispatcher, pieces):
    """Do a stage to its end, letting messages progress."""
    backoff = Backoff()
    sequence_number = dispatcher.read_sequence_number()
    for worked in pieces:
        if dispatcher.poke() or worked:
            backoff.reset()
        else:
            dispatcher.wait_for_change(backoff, sequence_number)
        sequence_number = dispatcher.read_sequence_number()


def echo(dispatcher, handle):
    """Lay rows down at home as they come, as experts would that do nothing: a stage in place of `compute`."""
    for batch in dispatcher.receive(handle):
        if batch is None:
            yield False
            continue
        places = dispatcher.find_rows(handle, batch)
        for part, _ in batch.split_chunks(dispatcher.sizes.batch_rows):
            rows, _ = dispatcher.gather(places[part])
            dispatcher.scatter(rows, places[part])
            yield True
        dispatcher.return_batch(handle, batch)


def come_home(dispatcher, handle):
    """Wait until all rows are home: a stage in place of `combine`, which then sums them."""
    while not dispatcher.poll_results(handle):
        yield False


def serve(dispatcher):
    """Wait until nothing is left to do for others, who may be waiting for what lands here: a stage after the last."""
    while not dispatcher.is_idle:
        yield False


def carry(layer, handle):
    """Dispatch a routed micro-batch, and have its rows come home from experts who do nothing."""
    finish(layer.dispatcher, layer.dispatch(handle))
    finish(layer.dispatcher, echo(layer.dispatcher, handle))
    finish(layer.dispatcher, come_home(layer.dispatcher, handle))
    finish(layer.dispatcher, serve(layer.dispatcher))

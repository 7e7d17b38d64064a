"""An exchange's stages done by hand, one after the other, with experts that do nothing."""

from hpcmoe.comm.transport import Direction
from hpcmoe.dispatch.dispatcher import ExchangeId
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


def carry(dispatcher, x, plan, gates):
    """Dispatch the rows of a routed micro-batch [T, H], and have them come home from experts who do nothing."""
    exchange = ExchangeId(0, 0, Direction.DISPATCH)
    finish(dispatcher, wait_ready(dispatcher, plan, exchange))
    handle = dispatcher.dispatch(plan, x, gates, exchange)
    finish(dispatcher, return_rows(dispatcher, handle))
    finish(dispatcher, wait_results(dispatcher, handle))
    finish(dispatcher, serve(dispatcher))


def wait_ready(dispatcher, plan, exchange):
    """Wait until an exchange can be announced."""
    while not dispatcher.poll_ready(plan, exchange):
        yield False

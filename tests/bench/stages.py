"""A layer's stages done by hand, one after the other, as the engine does the one lane of a serial schedule."""

from hpcmoe.wait import Backoff


def finish(exchange, pieces):
    """Do a stage to its end, letting messages progress."""
    backoff = Backoff()
    news = exchange.count_news()
    for worked in pieces:
        if exchange.poke() or worked:
            backoff.reset()
        else:
            exchange.wait_for_news(backoff, news)
        news = exchange.count_news()


def echo(exchange, flight):
    """Lay rows down at home as they come, as experts would that do nothing: a stage in place of `compute`."""
    for batch in exchange.batches(flight):
        if batch is None:
            yield False
            continue
        places = exchange.rows_of(flight, batch)
        for part, _ in batch.portions(exchange.sizes.batch_rows):
            rows, _ = exchange.take(places[part])
            exchange.lay(rows, places[part])
            yield True
        exchange.finish(flight, batch)


def come_home(exchange, flight):
    """Wait until all rows are home: a stage in place of `combine`, which then sums them."""
    while not exchange.is_home(flight):
        yield False


def serve(exchange):
    """Wait until nothing is left to do for others, who may be waiting for what lands here: a stage after the last."""
    while not exchange.is_idle:
        yield False


def carry(layer, flight):
    """Dispatch a routed micro-batch, and have its rows come home from experts who do nothing."""
    finish(layer.exchange, layer.dispatch(flight))
    finish(layer.exchange, echo(layer.exchange, flight))
    finish(layer.exchange, come_home(layer.exchange, flight))
    finish(layer.exchange, serve(layer.exchange))

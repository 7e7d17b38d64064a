"""hpcmoe: mixture-of-experts models whose experts are spread over MPI ranks.

The chapters in the order in which they may import each other, which is the order of the story:

    output, interrupts    what is printed; Ctrl-C and SIGTERM
    start, segments       what comes before the first import; what dead ranks have left in MPI's way
    mpi_library           the MPI under mpi4py, or one line on what keeps it away
    wait, watch, clock    waiting without stealing the core; noticing a rank's death; where the seconds went
    errors, environment   how a rank fails; variables that others set
    messages, paths       what a user wrote, on one line; ~ and $VARIABLES
    config                run.toml
    cluster/              where we run: topology and its links, measured or given, the mesh of ranks
    comm/                 what carries bytes: the device's memory, the transport between ranks
    dispatch/             a token leaves and returns: router, plan, dispatcher
    experts/              what happens there: feed-forward networks, one layer as its stages
    model/                what is trained: a language model over bytes, its text, what balances its routers
    pipeline/             many tokens at once: the schedule as data, the engine that runs it
    placement/            where experts live: from a problem of tokens, links and memory to experts on ranks
    prepare/              what fits: sizes, memory, budget, shards and placement of a run
    report/               what is shown: metrics, progress, tables, figures
    run/                  many steps: training, inference, optimizer, gradient sums, rebalancing
    write/                what is kept: records, activations, checkpoints
    main                  the program on one page
    place                 placement by itself
    check, settings       what there is to run on, told and tried; every key, or one config whole
    __main__              the `hpcmoe` command, which lists and runs the programs

The path of a token:

    model.text      bytes of real text become a micro-batch, this rank's share of it
    model.language  embedding; in each block attention, then a norm
    router          logits = W_g x, softmax, the top K experts and their gate weights
    plan            each copy finds a replica of its expert; rows are sorted by destination
    dispatch.host   dispatch: rows are packed and sent to their experts' ranks, without blocking
    feed_forward    experts work on the rows of the peers that have landed
    dispatch.host   combine: results travel home
    layer           the K results, times their gates, are added to the residual
    run.optimizer   on the way back gradients take the same path; gradients are summed, clipped, applied

Letters in shapes: T tokens of this rank's micro-batch, K experts of a token, N = T * K copies, N' copies sent (not
dropped), R rows received, H hidden size, F feed-forward size, E logical experts, P ranks of the expert-parallel group,
s slots of a rank, S = P * s replica slots, L layers, M micro-batches.
"""

__version__ = "0.2.0"

"""From the journal to the backends: one process numbers its events once, and delivers them to each child by itself.

This is the theory of operation. The modules, from the ground up:

    states, account    the states of a child, the outcomes of an export, the actions; the numbers of `stats()`
    batch_size         how many events one export may have
    backoff            the policy for exports and reads that fail: retries, waits, sizes, rejections
    progress_bars      for a child that wants it so, only the latest update of a progress bar in each second
    delivery           one child: its queue, its batches, its state and its account
    flush              how long a flush waits for the children
    memory             how many bytes of events wait in memory
    schedule, space    when events have to be on disk, and how many bytes they may take there
    own_folder         this process's folder of the spool
    stream_marks       marks in it: which streams have ended, and whether the process has
    spilling           writes the journal's events to it
    journal            numbers events, and hands each out to the children that want it
    rejections         keeps the events that a backend rejects, before they are acknowledged
    budgets            a child's budget, shared by all processes of the machine where the spool allows it
    last_words         says in the streams of a dead process that it has died
    worker             the thread that does what the deliveries of a child say, in turn
    handover           who delivers: this process or the machine's agent
    recovery           delivers the events of dead processes
    tailing            delivers the events of living processes, for the agent
    status             what the process says of its children, for `composite-logstore status`
    keeper             the threads that bring events to disk in time, and look after the folder
    writer, writers    the journal, workers and services of one log store; all of them in a process, forks and exit
    metrics, step_metadata    the account as OpenTelemetry's metrics, and in a step's metadata

States of a child
-----------------

    healthy ──a failure──▶ retrying ──the longest wait is reached──▶ unavailable
       ▲                      │                                          │
       └──────────────────────┴────── the backend answers ───────────────┘

A refusal, a hanging export, a flush without progress, or ten rejections in a row lead to `unavailable` at once.
`states.TRANSITIONS` lists each state and outcome, docs/architecture.md shows the table, and `test_docs.py` compares the
two. A state is only a report. It decides whether a flush waits, and nothing else: retries continue in every state, and
the retry of the oldest batch is the probe that finds out whether an unavailable backend works again.

The way of an event
-------------------

    emit ──▶ captured ──hand_out──▶ queue ──next──▶ batch ──export──▶ acknowledged (delivered or rejected)
                                      │               ▲
                                      └─queue is full─┴─▶ on disk, and loaded from there; or dropped

A batch is due when it is full or has waited long enough. Where that is more than a second, an urgent event makes it due
at once, at most once a second: the journal wakes the workers for it if one of them waits for it (`Wait.urgent`). The
tests are in `test_last_words.py`.

Invariants
----------

1. The numbers of a journal ascend without gaps, and so do the sequences of a writer's events in each stream. Only
   events that were lost on the way from a forked process leave a gap in the sequences, and count as dropped.
2. `accepted = delivered + rejected + dropped + withheld + pending` for each child, at every moment. Accepted is
   counted in the step that puts an event into the queues; dropped is not counted, but is the difference. So no event
   can leave without a trace, and a queue that overflows needs no code of its own.
3. A child gets its events in the order of their numbers. An export has the front of the first batch, and only one
   export is under way.
4. An event leaves memory only when the child has acknowledged it, when it is on disk, or when it counts as dropped.
   `oldest` never says more than that, and the position on disk is never above it: a kill makes duplicates, not gaps.
5. No failure is permanent but a rejection. No backend can ask for more than an hour, and none can make the waits so
   short that it is flooded.
6. An exception of any thread is met by that thread: it is counted, reported once, and the next step follows.

Who may touch what
------------------

One reentrant lock, `Journal.lock`, guards the journal, all its deliveries, the memory's count and the spilling. It is
held for moments, and never across I/O with a backend. `write_ahead` copies lines into mapped files under it, which
needs no call of the system. A recovered journal has a lock of its own.

- `emit`, in the pipeline's threads, appends to `Journal._captured` without the lock, and takes it only to hand out.
- A worker calls `Delivery.next`, and reports the result of the action, under the lock. It exports without it.
- No thread logs under the lock. ZenML calls `emit` under the lock of a logging handler, so a thread that held the
  journal's lock and logged could wait for a thread that waits for the journal's lock: for ever.
- Threads that have time take the lock by `service.patiently`.

Tricks, and what they rely on
-----------------------------

- *`deque.append` without the lock.* It is one C call that keeps the GIL. The test is
  `test_journal.py::test_threads_leave_no_gap_and_no_duplicate`.
- *One C call for a step* (`journal._run`). Python runs signal handlers between bytecodes only, so a Ctrl-C finds the
  step done or not begun. The test is
  `test_journal.py::test_a_ctrl_c_at_any_point_of_an_append_leaves_the_journal_consistent`.
- *A reentrant lock, and a look at the last number before the step.* A signal handler or a finalizer may log at any
  moment, in the thread that holds the lock. It hands out all captured events, and the interrupted step begins again.
  The test is `test_journal.py::test_a_signal_s_handler_may_log_at_any_point_of_an_append`.
"""

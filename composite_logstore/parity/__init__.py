"""Parity: whether children hold the same events of a stream, and copying the events that a child is missing.

# Theory of operation

A stream's events are identified by their writer and their sequence number, which has no gaps. Everything here works on
sets of these numbers (`intervals`), and needs no order and little memory: a stream without losses is one interval.

**Reading a stream as a whole** (`scan`). A child is a `Source`: its scanner, and its settings. A backend whose reader
can scan yields chunks of raw records; any other is read page by page, with retries. Records that another program wrote
have no identity. They get a writer that is computed from the stream's ID, and are numbered in the order in which they
lie.

**Comparing** (`compare`, `holding`, `fields`, `result`, `summary`).

1. Each child is scanned once, one after the other. Its `Holding` keeps the numbers, and for each block of 1,024 numbers
   of a writer the sum of the contents' hashes.
2. An event is *missing* in a child if the child's settings expect it (`ChildConfig.expects`, and `Expectation` for
   rules and sampling) and another child has it, or if no child has it although later events of its writer arrived. The
   latter counts only for children that get every event: for others, nothing tells whether they should have had it.
   Where a stream is being written, events after a child's last one are *arriving*. The stream may grow while the other
   children are scanned, so a child that seems to be missing the newest events is scanned again, from where its scan
   ended. Repeats of what a child has are found last, since only the other children together with it tell them.
   What a budget has withheld is missing, too: it depends on what else was sent. But the child has a notice where its
   budget was used up, so the missing events of that writer from there on, up to the next event that needed the budget,
   are counted as those that it may have withheld.
3. Where the sums of a block differ, and only there, the children are read again, and the events are compared one by
   one. `Holding` remembers which numbers lie between which two tokens, so that not the whole stream is read again.
4. Events in which children differ are looked up once more for the report, at most `NAMED` of each kind.

Children of the same raw format are compared in all fields, others in the fields that every reader shows. A text that
one of them masks is compared by the pieces between the masks (`fields`), since the comparison knows no secrets. The
other events need no more than their hashes in memory; redacted ones are read once more, some MiB at a time.

**Copying** (`backfill`, `sender`, `ledger`). A backfill reads the source once, and sends each event that the target
does not hold, unless the target's settings do not expect it, or it is too old for the target's backend. IDs and
timestamps stay as they are.

- Invariant: what is in the ledger was accepted by the target. The sender notes a batch after its export has returned,
  and before the next batch is exported. So a backfill that was interrupted repeats at most one batch.
- A target that keeps its events in order shows at once what it has, so the ledger is not asked. Any other may take a
  while until it shows an event, or cannot be read at all. There, what the ledger has counts as held: for
  `REMEMBERED_SECONDS` if the target can be read, and for good if it cannot.
- Exporters skip an event that does not follow the last one of its writer, since a retry looks like that. An event that
  comes after later ones is sent after `end_stream`, which makes the exporter forget. In a target that keeps the order,
  it gets the attribute `BACKFILLED`, so that it does not count as out of order.
- Two threads: the caller's reads, decides and fills batches; the sender's exports them. At most two batches wait
  between them.
- One backfill to a child runs on a machine at a time: `open_ledger` holds a lock.

`tests/properties/test_parity.py` and `tests/properties/test_backfill.py` check this against models that keep every
event.
"""

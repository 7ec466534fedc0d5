"""Reading: how `fetch()` answers one page from the primary, or from a child that stands in for it.

# Theory of operation

A page is read from one child, without state between requests: ZenML's server makes a new log store for each. All that
the next page has to know is in its cursor.

**Which child answers** (`pages`, `unreachable`, `nesting`). A first page comes from the primary, or else from the first
child of `fetch_fallback` that answers; an entry at its top then says why. For 30 seconds the process does not ask a
child again that could not be read, unless it is the last. A page that continues comes from the child that made the
cursor, and from no other: a token means nothing to another reader. Children may be log stores that contain other log
stores, so the depth, the number and the time of one page's reads are bounded together.

**What a cursor says** (`cursor`). The child and its reader's token, the direction, the limit and the filter, and which
events were returned before: a set of numbers for each writer. A cursor is plain text that anybody can write, so it
contains no secret, and everything in it is checked before it is used. It has a bounded length. If the set takes too
much room, the oldest part is forgotten, so that in the worst case an event is shown twice, but never hidden.

**Duplicates.** A batch that may have arrived is exported again, so a backend may hold an event twice. A reader returns
what its backend holds; `without_duplicates` drops an event that this page or an earlier one has returned, whatever its
place. A reader need not return events in their writers' order.

**Gaps** (`gaps`). A writer numbers the events of a stream without gaps, and sends them in order. So once the stream has
ended, a number that is missing below one that a page shows will not arrive any more.

- Each gap is told once: on the page that makes both of its ends known, whichever the direction.
- It is told only for children that get every event, on pages without a filter, and of streams that have ended.
- An event may lie elsewhere in the child. So the child is asked once more: a scanner scans the stream for at most two
  seconds, and a reader without order searches by time around each gap. What was not searched is said to be unchecked.
- A page never fails for lack of information about its gaps.

**Nothing** (`nothing`). A stream without entries is an empty page if nothing was logged; otherwise an entry or an error
says what is known of it.

**Ranks** (`ranks`). ZenML's entries have no place for the rank of a process. So the `fetch()` that ZenML calls puts it
in front of the message, last of all: cursors and filters know nothing of it. What this package itself reads through a
log store, with `zenml.fetch_page`, has the rank beside the message, as in `composite-logstore logs`.

Bounds: a page takes about `pages.LONGEST_SECONDS`, all children together `nesting.LONGEST_SECONDS`.
`tests/properties/test_cursors.py`, `test_gaps.py` and `test_artifact_pages.py` page through streams in every way.
"""

"""From a log record to an event, in the process that logs and on the way from a forked process.

Theory of operation
===================

**A record.** `emit` runs in the pipeline's thread, so it does as little as possible. `record.note` copies every value
that may change later into a tuple, and takes no lock. The journal makes the note an event when it numbers it
(`record.numbered`): that checks and bounds every value. Neither function raises, whatever a record contains. There are
two shapes: a note, private to the process, and a `LogEvent`, which every backend and another process can hold.

**A print.** ZenML makes a record of each `write` to stdout and stderr. `lines.Lines` joins the notes of one thread,
file and stream to one note for each line, or for each update of a progress bar:

    dispatch_watched -> Lines.write -> a pen's inbox -> Terminal -> Tracebacks -> the journal

`terminal.Terminal` draws the text as a terminal does, and `tracebacks.Tracebacks` joins lines that belong together.
Both depend on the text alone, and not on how it is split into writes
(test_printed_lines.py::test_the_same_lines_are_shown_of_a_text_in_any_parts). A thread that has put something into
an inbox takes it in if the pen is free, and otherwise leaves it to the thread that has the pen. So a line's parts
stay in order, and no thread waits: not a signal handler, and not a finalizer that prints under the journal's lock.

**Levels.** `record.numbered` also decides the level of what was printed to stderr, by the stream's `stderr_level`
(`levels`). It runs under the journal's lock, so it looks at the beginning of a text only, and in one pass
(test_levels.py::test_the_longest_and_oddest_line_takes_no_time). Values of array libraries become numbers in `note`:
their `item` may block or raise, as any value's `str` may, and then only the thread that logs has to wait.

**A fork.** A forked process has none of its parent's threads, its locks may be held for ever, and it is unsafe to open
backends in it (gRPC hangs, fsspec raises). So it appends its events, without numbers, to a file without a name that it
has inherited, and the parent journals them:

    forked process                                      parent
    Parent.send -> Outbox --frames--> two files --> Inbox -> ForkedProcesses -> Journal
                          --a byte--> pipe (wakes the parent's thread)
                   Outbox <--numbers-- shared memory (frames that are journaled)

A pipe alone would not do: it holds 1 MiB, which four workers of a data loader fill in a tenth of a second, and the
events that they would have to keep for later would die with them. An event in a file arrives even if its sender is
killed in the next moment.

**The files** take turns: while senders append to the current one, the parent reads the rest of the other and then
empties it, a second after the turn, when no sender can still be about to append to it. A sender writes each frame in
one `write` with `O_APPEND`, and the system does not mix those of two processes.

**Acknowledgement.** A sender keeps each frame until the shared memory says that the parent has journaled it. The state
in the shared memory decides who delivers a frame that is not acknowledged:

- `OPEN`: the parent. Senders append, the parent journals.
- `CLOSING`: the parent, if it journals the frame within a second. It reads for the last time, and senders append
  nothing more.
- `CLOSED`, or a dead parent (its child has another one, the pipe no reader): the sender. It journals the frame
  itself, and is a writer of its own from then on (`Parent._take_over`).

Invariants, with the test that would catch a mistake:

- An event is journaled exactly once; twice only if the parent is killed between journaling and acknowledging it
  (test_fork.py::test_a_forked_process_takes_back_events_that_the_parent_has_not_journaled).
- A frame that is not whole is one counted loss and hides no other frame
  (test_poison.py::test_unreadable_frames_of_forked_processes_are_counted_and_hide_no_others).
- A full file takes no more events, and the sender reports their number, so the parent's account stays complete
  (test_fork.py::test_events_that_do_not_fit_into_the_file_count_as_dropped).
- A sender keeps at most 64 MiB of frames (test_fork.py::test_the_frames_that_a_forked_process_keeps_are_bounded).

Who touches what: `Inbox.receive` runs in one thread at a time, under `ForkedProcesses._receiving`; `Outbox` in one
thread at a time, under `Parent._sending`. Both locks are reentrant, since a signal handler may log or flush while its
thread holds them; `is_sending` and `_is_receiving` tell it to leave the work to the code that it has interrupted. The
shared memory has one writer, the parent, and needs no lock: each of its values is one aligned machine word.
A Ctrl-C may come between any two bytecodes, so state that belongs together changes in one C call (`Inbox._advance`).
"""

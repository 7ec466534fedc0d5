"""The journal on disk: one folder for each process, with its events and how far each child is with them.

    <spool_directory>/<log store's id>/          the component's folder
        <writer>/                                one process's folder
            owner.lock                           locked by the process as long as it lives
            <number of its first event>.log      a segment: lines of events and streams, in the journal's order
            spare                                the next segment, allocated before it is needed
            <child>.settled                      the child's position: it has acknowledged all events below a number
            delivery.lock                        locked by the process or the agent: the one that delivers
            account                              what agents have delivered of the events
            due                                  the number below which a flush wants all events delivered
        <writer>-2/                              a later folder of the same process, if the first was taken away
        .hidden-.../                             a folder that is being made or removed
        damaged/                                 pieces that could not be read
        rejected/                                events that a backend has rejected for good
            <child>.<time>.log                   lines of such events, oldest first
            <child>.discarded                    how many older ones had to make room
            lock, manage.lock                    locked while a file is changed; while a command works on all
        status/<writer>                          what a living process says of its children
        budgets/<child>.<period>                 what all processes have charged to a child's budget

Beside the components' folders, `agent/owner.lock` is locked by the machine's agent. Only processes that let the agent
deliver have the files `delivery.lock`, `account` and `due`.

This is the theory of operation. The modules:

    format           how lines and positions look as bytes
    lock             which process owns a folder
    positions        how far each child is, and what is due
    account          what agents have done for each child
    segments         writes events
    reader           reads events
    damage           keeps damaged pieces
    rejected         keeps rejected events
    status_files     what processes say of themselves
    charges          budgets that processes share
    folder           makes a folder, recovers it, looks after it and removes it
    settings         where the spool of a log store is, and how large it may be
    private_folder   opens folders and files, and trusts none unseen
    mapped, streams  files that are mapped into memory; one object for each stream
    marks            which streams have ended, and whether the process has

States of a folder
------------------

    hidden ──named──▶ alive ──its process dies──▶ dead ──recovered──▶ recovered ──all acknowledged──▶ removed
                        │                           ▲                     │
                        │                           └──its process dies───┘
                        └──somebody takes it away──▶ gone: the process makes a new one

- *hidden*: being made. It is locked first and named then, so that no process takes a new folder for a dead one's. If
  its process dies before that, `process_folders` removes it after an hour.
- *alive*: `owner.lock` is locked by the process that writes. Others may read it (`Spool.look`).
- *dead*: no process holds the lock. The system has released it, however the process ended.
- *recovered*: another process holds the lock and delivers the events. It adds none.
- *gone*: another folder, or nothing, is at its path. What is still in memory goes to a new folder.

Invariants
----------

1. Event numbers ascend within a folder, and a segment's name is at most the number of its first event.
2. A segment is appended to and never changed, with one exception: recovery moves damaged pieces out, and overwrites
   them by empty lines.
3. A segment is removed only when each position is above its last number, or when it has to make room (then its events
   count as dropped). So a child finds all events from its position on, unless the account says otherwise.
4. A position never says more than the child has acknowledged. It may say less: a process that dies between an export
   and the note of it has that batch sent again. Duplicates are possible, gaps are not.
5. Each segment names the open streams, a hundred at most, and whether the process has ended in order. So the segments
   that are left say both, however many were removed. A mark makes no event give way.
6. All bytes of a segment are allocated before any is written. Writing to an unallocated page of a full disk would kill
   the process.
7. No file is opened by its path alone, no byte is believed unchecked: others may write beside the log store's folder.

What a crash leaves
-------------------

Copying into a mapping is no call of the system. What was copied belongs to the operating system, and is there after
SIGKILL; it reaches the disk some seconds later, so a power failure costs those seconds. The copy of a line may be cut
off. Then the last line has no end, and is ignored: no `emit` has returned for it. A position that is cut off has a
wrong checksum, and counts as 0. A folder gets its name by a rename once it is locked, a segment once it is allocated.
The tests that kill processes at random moments: tests/integration/test_crashes.py; those that damage files at random:
tests/properties/test_spool.py.

Threads and locks
-----------------

- The *journal's lock* guards a living process's `Spool`, a *recovered journal's lock* a recovered one's, with the
  exceptions below.
- The *housekeeping thread* calls `Segments.prepare`, `Segments.tidy` and `Spool.standing` without that lock, since the
  disk may take long for them. The test is
  test_spilling_in_time.py::test_an_event_is_on_disk_within_a_second_even_if_the_disk_is_slow. The methods rely on
  the GIL: `deque.popleft`, `list(...)` of a list or of a dictionary's items, and the assignment of an attribute are
  each one C call, so another thread sees the state before or after it. What they see may be old at once, so nothing
  they conclude is final: `standing` only asks for `mend`, which looks again under the lock.
- A *worker* reads with a `ForwardReader` of its own, without any lock. It relies on the system to show a reader of the
  file what was copied into the mapping, and on the journal to ask only for numbers that are already written
  (test_spool.py::test_a_reader_continues_where_it_ended).
- `flock` is the only thing that processes share (see `lock`).
- `make torture` runs all this with real threads, and kills processes and removes files meanwhile: it would catch a
  mistake that the simulated threads of the unit tests do not.
"""

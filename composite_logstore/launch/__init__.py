"""`composite-logstore run`: collects from a command and all Python processes below it.

Theory of operation
===================

The processes below the command may be many, short, or of another environment, so none of them imports ZenML or this
package. They send what they log and print to the process of `run`, which has joined the step's stream:

    a Python process below the command               the process of `run`
    site/sitecustomize.py -> Sender ----frames----> Collector -> Joined -> the log store
    descriptors 1 and 2 --------pipes-------------> Collector -> the terminal, and Joined

**It begins by itself.** `run` puts the folder `site` in front of `PYTHONPATH`, so that each Python process below
imports its `sitecustomize`, as the tools of OpenTelemetry do. It imports the environment's own one afterwards.

**Nothing is lost with a process.** What a process has sent is in the buffer of a socket of `run`, and stays there if
the process is killed. A process waits only while that buffer is full, and gives up after `SEND_SECONDS`.

**The output stays as it is.** Without `--capture-fd` the command has the descriptors of `run` itself: nothing is in
between. With it, descriptors 1 and 2 are pipes, or pseudo-terminals in place of a terminal, and `run` writes on what it
reads, at once and byte for byte. A pipe that the same process read would not do: code in C that holds the GIL and fills
the pipe would wait for ever.

**Nothing is collected twice.** With `--capture-fd`, Python's own streams write to the terminal itself: `run` passes its
descriptors on, and a pipe for each of the process's two, so that it knows the process and the rank. What remains in the
pipes is what is written around Python's streams.
"""

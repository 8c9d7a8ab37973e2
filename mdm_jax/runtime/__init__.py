"""The process and its machine: devices, signals, several processes, files.

`sharding` places arrays on meshes; `rendezvous` and `distributed` make one run
of several processes; `command` runs a command to its end, `ending` makes that
end short, and `preemption` handles signals; `watchdog` and `replica_check`
notice what hangs or computes wrongly; `cpu`, `compilation_cache` and `peaks`
are about devices; `files` writes files whole or not at all, on
disks and in the buckets of `buckets`, `appending` appends to those in buckets,
and `directory_lock` lets only one process write to a directory.
"""

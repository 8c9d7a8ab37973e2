"""The process and its machine: devices, signals, several processes, files.

`sharding` places arrays on meshes; `rendezvous` and `distributed` make one run
of several processes; `preemption` handles signals; `watchdog` and
`replica_check` notice what hangs or computes wrongly; `cpu`,
`compilation_cache` and `peaks` are about devices; `files` writes files whole or
not at all.
"""

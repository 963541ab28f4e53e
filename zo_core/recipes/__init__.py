"""One flat function per job: what the worker runs. Each reads like the steps of the job."""

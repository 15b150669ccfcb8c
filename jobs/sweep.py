"""`bridgework sweep` as a job: ray job submit --working-dir . -- python -m jobs.sweep ...; the same words."""

from jobs._run import main

if __name__ == "__main__":
    main("sweep")

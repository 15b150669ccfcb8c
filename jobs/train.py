"""`bridgework train` as a job: ray job submit --working-dir . -- python -m jobs.train ...; the same words."""

from jobs._run import main

if __name__ == "__main__":
    main("train")

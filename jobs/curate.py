"""`bridgework curate` as a Ray job, with the same arguments.

ray job submit --working-dir . -- python -m jobs.curate ...
"""

from jobs._run import main

if __name__ == "__main__":
    main("curate")

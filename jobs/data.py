"""`bridgework data` as a Ray job, with the same arguments.

ray job submit --working-dir . -- python -m jobs.data import folder PHOTOS DEST
"""

from jobs._run import main

if __name__ == "__main__":
    main("data")

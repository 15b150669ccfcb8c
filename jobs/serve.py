"""`bridgework serve` as a Ray job, with the same arguments.

ray job submit --working-dir . -- python -m jobs.serve chat model=llava
"""

from jobs._run import main

if __name__ == "__main__":
    main("serve")

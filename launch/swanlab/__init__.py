"""SwanLab Launch: sends the code and one config as a task to SwanLab's GPUs, and sends it again until the run is done.

    spec.py          launch/swanlab.yaml, read strictly
    settle.py        the config, as it can work in a task
    requirements.py  what the task installs: our own pins, without what tests and the demonstration need
    leaks.py         what looks like a secret
    bundle.py        the folder that is sent: the same bytes for the same tree
    service.py       SwanLab's service
    cos.py           the object store behind it
    selection.py     which files of a folder are a data set or a corpus
    upload.py        a data set, to be mounted below /data/
    rounds.py        task after task, until the run is complete
    cli.py           the commands

How a task gets at an object store
    A task has no environment but the service's own, and what is uploaded may be seen by others: SwanLab's documentation
    says not to upload anything secret. So nothing secret is, unless one is told to:

    data         comes from the volume, or from an https:// URL that anybody may read: no credentials
    checkpoints  go to the task's own disk, and are gone with it, the model too: for a trial; or to an object store,
                 which takes credentials. `--with-credentials NAME,...` puts these variables into the bundle. Make them
                 for this: temporary (with an AWS_SESSION_TOKEN) and for nothing but run.output. With --until-done the
                 bundle is deleted from SwanLab's store when its task has ended, as long as the command runs.

    Considered and left: a bucket that anybody may write, whose URL would be the secret; signed URLs, since the names of
    checkpoints are not known beforehand; the keys that the service gives for its own store, which are for code and
    data, and whose rights beyond that nobody has told.
"""

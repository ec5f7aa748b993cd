"""SwanLab Launch client: send the code and one config to SwanLab's GPUs as a task, and resubmit until the run is done.

    spec.py          read launch/swanlab.yaml and check every key
    task_config.py   load the config and check that it can work in a task
    requirements.py  list the packages that the task installs
    secret_scan.py   find text and file names that look like secrets
    bundle.py        pack the folder that is sent into one reproducible zip file
    service.py       call SwanLab's HTTP API
    cos.py           write to the object store behind that API
    retry.py         tries and pauses of both
    selection.py     choose which files of a folder are uploaded as a data set
    upload.py        upload a data set, which a task finds below /data/
    resubmit.py      start task after task until the run is complete
    cli.py           the commands

How a task reaches an object store
    A task's environment holds only the variables that the service sets, and uploads may be visible to others:
    SwanLab's documentation says not to upload anything secret. So credentials are sent only on request:

    data         comes from the volume, or from a public https:// URL. It needs no credentials.
    checkpoints  go to the task's own disk by default and are deleted with it, and so is the model. This is enough for
                 a trial. To keep them in an object store, name the credentials: `--with-credentials NAME,...` puts
                 these variables into the bundle. Use keys made for this purpose: temporary ones (with an
                 AWS_SESSION_TOKEN) that reach run.output only. With --until-done the bundle is deleted from SwanLab's
                 store when its task has ended, if the command is still running.

    Alternatives that were rejected: a bucket that everybody may write, because its URL would be the secret; signed
    URLs, because the names of checkpoints are not known in advance; the keys that the service gives for its own store,
    because they are for code and data, and nothing documents what else they allow.
"""

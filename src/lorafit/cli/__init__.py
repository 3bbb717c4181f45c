"""The command line: `lorafit`, one small file for each subcommand.

Importing this package, and asking any command for its help, imports neither torch nor transformers: what a command
needs it imports when it runs.

    main       exit statuses, errors and warnings; everything else is below it
    app        the table of commands
    options    the options that several commands share, each with its help
    openended  a command that takes options by names that it does not declare
    values     text of the command line to values
    yamlfile   a file of settings, each with its line
    settings   file < --set < flags, resolved
    screen     what is said, and where
    quiet      third parties that would talk in between
"""

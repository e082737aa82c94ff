"""`python -m cascadeinfer` is the command `cascadeinfer`, for environments whose scripts are not on the path."""

from cascadeinfer.cli.main import main

if __name__ == "__main__":
    main()

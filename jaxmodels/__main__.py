"""`python -m jaxmodels`."""

from jaxmodels.cli.main import main

if __name__ == "__main__":
    main()

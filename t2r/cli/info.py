"""`t2r info`: what a model is, without loading its weights."""

import click


@click.command("info", epilog="Example: t2r info runs/demo/model")
@click.argument("model", metavar="MODEL")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, as_json: bool) -> None:
    """Show the mixer of every layer, parameters by kind, and state size against the KV cache of MODEL.

    MODEL is a folder or Hub id of a teacher or a student; only config.json and the file headers are read.
    """
    import json

    from t2r.convert.inspection import inspect_model, print_information
    from t2r.convert.show import make_console
    from t2r.resources import resolve

    found = inspect_model(resolve(model))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_information(found, make_console())

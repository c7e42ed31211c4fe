"""The JSON schema of the YAML file, for editors.

raylora schema > raylora.schema.json
"""

from __future__ import annotations

import json

from raylora.commands.options import SchemaConfig
from raylora.config.run import Config


def run(config: SchemaConfig) -> int:
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    print(json.dumps(schema, indent=2))
    return 0

"""The building blocks of models, as pure functions of arrays. Import a module: ``from jaxlm.nn import attention``."""

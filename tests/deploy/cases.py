"""Values of the chart that the tests render: each switch in both positions."""

from __future__ import annotations

from typing import Any

IMAGE: dict[str, Any] = {"image": {"repository": "registry.example/eldr"}}
NO_BUS: dict[str, Any] = {"nats": {"enabled": False}}

EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example/eldr", "tag": "1.2", "pullSecrets": [{"name": "registry"}]},
    "discovery": {"namespace": "workers", "worker": {"selector": "app=whole,tier in (a, b)", "port": 8100}},
    "config": {
        "port": 9000,
        "max_inflight": 128,
        "max_body_bytes": 33554432,
        "load_interval_s": 0.5,
        "tail_guard": "inf",
        "learn": "off",
        "allowed_origins": ["https://app.example"],
        "worker_costs": {"http://10.0.0.1:8200": "qwen3-30b-a3b-rtxpro6000"},
        "shutdown_delay_s": 4.5,
        "grace_s": 600,
    },
    "secrets": {
        "apiKeys": {"name": "clients"},
        "adminKey": {"name": "admin"},
        "workerApiKey": {"name": "workers"},
        "reportKey": {"name": "reports"},
        "busCredentials": {"name": "bus"},
        "busCA": {"name": "bus", "key": "ca.pem"},
        "tls": {"name": "certificate"},
    },
    "peers": {"fleet": "north"},
    "nats": {"replicas": 3},
    "service": {"type": "LoadBalancer", "port": 443, "annotations": {"example.com/kind": "internal"}},
    "autoscaling": {"enabled": True, "maxReplicas": 4},
    "podDisruptionBudget": {"maxUnavailable": "50%"},
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}],
        "apiServer": {"ports": [8443], "cidrs": ["10.0.0.1/32", "10.0.0.2/32"]},
        "egress": [{"ports": [{"port": 4318}]}],
    },
    "serviceAccount": {"annotations": {"example.com/role": "none"}},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}, "authorization": {"name": "metrics"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True, "annotations": {"grafana_folder": "eldr"}},
    "podLabels": {"team": "serving"},
    "podAnnotations": {"example.com/owner": "serving"},
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "cpu", "operator": "Exists"}],
    "affinity": {"podAffinity": {}},
    "priorityClassName": "serving",
    "extraVolumes": [{"name": "costs", "configMap": {"name": "costs"}}],
    "extraVolumeMounts": [{"name": "costs", "mountPath": "/etc/eldr/costs", "readOnly": True}],
}

CASES: dict[str, dict[str, Any]] = {
    "default": IMAGE,
    "everything": EVERYTHING,
    "aggregated": {
        **IMAGE,
        "discovery": {
            "prefill": {"selector": ""},
            "decode": {"selector": ""},
            "worker": {"selector": "app==vllm,!old,x!=y", "port": 8000},
        },
    },
    "pool": {
        **IMAGE,
        "discovery": {
            "prefill": {"selector": ""},
            "decode": {"selector": ""},
            "worker": {"inferencePool": {"name": "qwen3"}},
        },
    },
    "divided pool": {
        **IMAGE,
        "discovery": {
            "prefill": {"inferencePool": {"name": "qwen3", "selector": "llm-d.ai/role=prefill"}},
            "decode": {"inferencePool": {"name": "qwen3", "selector": "llm-d.ai/role=decode", "port": 8200}},
        },
    },
    "picker": {
        **IMAGE,
        "router": {"enabled": False},
        "picker": {
            "enabled": True,
            "config": {"phase": "pair", "fallbacks": 3},
            "autoscaling": {"enabled": True, "minReplicas": 3, "cpuUtilization": 0},
            "inferencePool": {"create": True, "name": "qwen3", "matchLabels": {"app": "qwen3"}},
        },
        "discovery": {
            "prefill": {"selector": ""},
            "decode": {"selector": ""},
            "worker": {"inferencePool": {"name": "qwen3"}},
        },
        "autoscaling": {"enabled": True},  # the router's, which is not there
        "serviceMonitor": {"enabled": True},
        "prometheusRule": {"enabled": True},
    },
    # Every setting that a router has and a picker does not.
    "router and picker": {
        **EVERYTHING,
        "config": {**EVERYTHING["config"], "retries": 3, "processes": 2, "otel_endpoint": "http://collector:4318"},
        "picker": {
            "enabled": True,
            "replicas": 3,
            "config": {
                "grpc_listen": "0.0.0.0:9443",
                "port": 9090,
                "policy": "jsq",
                "prefill": None,
                "grace_s": 5,
                "worker_costs": {"http://10.0.0.2:8200": "qwen3-30b-a3b-rtxpro6000"},
            },
            "service": {"annotations": {"example.com/kind": "picker"}},
        },
    },
    "picker with workers of its own": {
        **IMAGE,
        "picker": {
            "enabled": True,
            "config": {"prefill": None, "decode": None, "worker": ["k8s+http:///inferencepools/whole"]},
        },
        "networkPolicy": {"egress": [{"to": [{"podSelector": {"matchLabels": {"app": "whole"}}}]}]},
    },
    "own bus": {**IMAGE, "nats": {"enabled": False}, "peers": {"url": "tls://nats.messaging.svc:4443"}},
    "no objects beside": {
        **IMAGE,
        **NO_BUS,
        "networkPolicy": {"enabled": False},
        "rbac": {"create": False},
        "serviceAccount": {"create": False, "name": "mine"},
    },
    # What a router knows that finds its workers by name, and has no others beside it.
    "alone": {
        **IMAGE,
        **NO_BUS,
        "replicas": 1,
        "discovery": {"prefill": {"selector": ""}, "decode": {"selector": ""}},
        "config": {"prefill": ["dns+http://prefill:8000"], "decode": ["dns+http://decode:8000"], "policy": None},
        "networkPolicy": {"egress": [{"ports": [{"port": 8000}]}]},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
    },
}

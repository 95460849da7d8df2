{{- define "eldr.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{- define "eldr.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "eldr.name" .) "default" .Values.serviceAccount.create) -}}
{{- end }}

{{/* What runs, as YAML: for each component the name of its objects, its command, replicas and resources. */}}
{{- define "eldr.components" -}}
{{- $name := include "eldr.name" . -}}
{{- $components := dict -}}
{{- if .Values.router.enabled -}}
{{- $router := dict "name" $name "command" "serve" "replicas" .Values.replicas "autoscaling" .Values.autoscaling "resources" .Values.resources -}}
{{- $_ := set $components "router" $router -}}
{{- end -}}
{{- with .Values.picker -}}
{{- if .enabled -}}
{{- $picker := dict "name" (printf "%s-epp" $name) "command" "epp" "replicas" .replicas "autoscaling" .autoscaling "resources" .resources -}}
{{- $_ := set $components "picker" $picker -}}
{{- end -}}
{{- end -}}
{{- if not $components }}{{ fail "there is nothing to run: set router.enabled or picker.enabled" }}{{ end -}}
{{- toYaml $components -}}
{{- end }}

{{/* Whose labels the objects have that all components share. */}}
{{- define "eldr.first" -}}
{{- ternary "router" "picker" .Values.router.enabled -}}
{{- end }}

{{/* Not empty if a component finds workers in Kubernetes, which takes a token and a way to the API server:
     (list $ "router"). */}}
{{- define "eldr.asksKubernetes" -}}
{{- if contains "k8s+" (include "eldr.config" .) }}true{{ end -}}
{{- end }}

{{/* What selects the pods of a component: (list $ "router"). */}}
{{- define "eldr.selector" -}}
app.kubernetes.io/name: {{ (index . 0).Chart.Name }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The labels of an object of a component: (list $ "router"). */}}
{{- define "eldr.labels" -}}
{{- $root := index . 0 -}}
{{ include "eldr.selector" . }}
app.kubernetes.io/part-of: {{ $root.Chart.Name }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ $root.Chart.Name }}-{{ $root.Chart.Version }}
{{- end }}

{{/* Where the workers of a role come from: (list $ "decode"). Empty if the role has none. */}}
{{- define "eldr.discovery" -}}
{{- $root := index . 0 -}}
{{- $role := index $root.Values.discovery (index . 1) -}}
{{- if $role.inferencePool.name -}}
{{- $query := list -}}
{{- range $key := list "selector" "port" -}}
{{- with index $role.inferencePool $key }}{{ $query = append $query (printf "%s=%v" $key .) }}{{ end -}}
{{- end -}}
k8s+http://{{ $root.Values.discovery.namespace }}/inferencepools/{{ $role.inferencePool.name }}{{ with $query }}?{{ join "&" . }}{{ end }}
{{- else if $role.selector -}}
k8s+http://{{ $root.Values.discovery.namespace }}?selector={{ $role.selector }}&port={{ $role.port }}
{{- end }}
{{- end }}

{{/* The labels that a selector asks for by KEY=VALUE. What else it asks for, a NetworkPolicy leaves open. */}}
{{- define "eldr.matchLabels" -}}
{{- $labels := dict -}}
{{- if not (contains "(" .) -}}
{{- range splitList "," . -}}
{{- if regexMatch "^[^!=]+==?[^=]+$" . -}}
{{- $pair := regexSplit "==?" . 2 -}}
{{- $_ := set $labels (index $pair 0 | trim) (index $pair 1 | trim) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $labels -}}
{{- end }}

{{/* The Secrets that a component mounts, by the name of their volume: the Secret, its entry, and the setting for its
     path: (list $ "router"). */}}
{{- define "eldr.secrets" -}}
{{- $root := index . 0 -}}
{{- $without := include "eldr.without" . | fromJsonArray -}}
{{- $settings := dict "apiKeys" "api_key_file" "adminKey" "admin_key_file" "workerApiKey" "worker_api_key_file" "reportKey" "report_key_file" "busCredentials" "peers_credentials_file" "busCA" "peers_ca" -}}
{{- range $name, $setting := $settings }}
{{- with index $root.Values.secrets $name }}
{{- if and .name (not (has $setting $without)) }}
{{ kebabcase $name }}: {secret: {{ .name | quote }}, entry: {{ .key | quote }}, setting: {{ $setting }}}
{{- end }}
{{- end }}
{{- end }}
{{- with $root.Values.secrets.tls.name }}
tls: {secret: {{ . | quote }}, entry: tls.crt, setting: tls_cert}
{{- end }}
{{- end }}

{{/* Settings of routers that a component does not have, as JSON: (list $ "picker"). */}}
{{- define "eldr.without" -}}
{{- if eq (index . 1) "picker" }}{{ (index . 0).Files.Get "files/routers-own.json" }}{{ else }}[]{{ end -}}
{{- end }}

{{/* A component's settings, as YAML: those of the chart, and the user's, which win: (list $ "router"). */}}
{{- define "eldr.config" -}}
{{- $root := index . 0 -}}
{{- $config := dict "host" "0.0.0.0" "port" 8000 -}}
{{- range $role := list "prefill" "decode" "worker" -}}
{{- with include "eldr.discovery" (list $root $role) }}{{ $_ := set $config $role (list .) }}{{ end -}}
{{- end -}}
{{- range $volume, $mounted := include "eldr.secrets" . | fromYaml -}}
{{- $_ := set $config $mounted.setting (printf "/etc/eldr/secrets/%s/%s" $volume $mounted.entry) -}}
{{- end -}}
{{- if $config.admin_key_file }}{{ $_ := set $config "admin_listen" "127.0.0.1:8001" }}{{ end -}}
{{- if $config.tls_cert }}{{ $_ := set $config "tls_key" "/etc/eldr/secrets/tls/tls.key" }}{{ end -}}
{{- with $root -}}
{{- if and .Values.peers.url .Values.nats.enabled }}{{ fail "give one bus: with peers.url, set nats.enabled to false" }}{{ end -}}
{{- if or .Values.peers.url .Values.nats.enabled -}}
{{- $_ := set $config "peers" (list (.Values.peers.url | default (printf "nats://%s-nats:4222" (include "eldr.name" .)))) -}}
{{- $_ := set $config "fleet" (.Values.peers.fleet | default (printf "%s-%s" .Release.Namespace .Release.Name | trunc 64)) -}}
{{- end -}}
{{- end -}}
{{- $config = mergeOverwrite $config (deepCopy $root.Values.config) -}}
{{- if eq (index . 1) "picker" -}}
{{- $_ := set $config "grpc_listen" "0.0.0.0:9002" -}}
{{- range include "eldr.without" . | fromJsonArray }}{{ $_ := unset $config . }}{{ end -}}
{{- $config = mergeOverwrite $config (deepCopy $root.Values.picker.config) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}

{{/* A value in TOML. Helm's numbers are floating-point, so toToml would write 256.0, and JSON has no infinity. */}}
{{- define "eldr.tomlValue" -}}
{{- if kindIs "slice" . -}}
[{{ range $i, $one := . }}{{ if $i }}, {{ end }}{{ include "eldr.tomlValue" $one }}{{ end }}]
{{- else if and (kindIs "float64" .) (eq (float64 (int64 .)) .) -}}
{{ int64 . }}
{{- else if eq (toString .) "inf" -}}
inf
{{- else -}}
{{ toRawJson . }}
{{- end -}}
{{- end }}

{{/* A component's ports, as YAML: (list $ "picker"). They are those at which its Service answers, too. */}}
{{- define "eldr.ports" -}}
{{- $config := include "eldr.config" . | fromYaml -}}
http: {{ int $config.port }}
{{- with $config.grpc_listen }}
grpc: {{ regexFind "[0-9]+$" . }}
{{- end }}
{{- end }}

{{/* eldr.toml of a component, (list $ "router"): first the keys of the top level, then the tables. */}}
{{- define "eldr.toml" -}}
{{- $config := include "eldr.config" . | fromYaml -}}
{{- range $key, $value := $config }}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ $key }} = {{ include "eldr.tomlValue" $value }}
{{- end }}
{{- end }}
{{- range $key, $value := $config }}
{{- if kindIs "map" $value }}

[{{ $key }}]
{{- range $name, $one := $value }}
{{ toRawJson $name }} = {{ include "eldr.tomlValue" $one }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "entrepot.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "entrepot.fullname" -}}
{{- $name := include "entrepot.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "entrepot.selector" -}}
app.kubernetes.io/name: {{ include "entrepot.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "entrepot.server" -}}
{{ include "entrepot.selector" . }}
app.kubernetes.io/component: server
{{- end }}

{{- define "entrepot.labels" -}}
{{ include "entrepot.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "entrepot.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "entrepot.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "entrepot.fullname" .) "default" .Values.serviceAccount.create) }}
{{- end }}

{{- define "entrepot.scheme" -}}
{{- ternary "https" "http" (not (empty .Values.tls.secretName)) }}
{{- end }}

{{/* What is true is "true", what is not is nothing. */}}
{{- define "entrepot.isDaemonSet" -}}
{{- if eq .Values.mode "DaemonSet" }}true{{ end }}
{{- end }}

{{- define "entrepot.several" -}}
{{- if or (eq .Values.mode "DaemonSet") (gt (int .Values.replicas) 1) }}true{{ end }}
{{- end }}

{{- define "entrepot.peers" -}}
{{- if kindIs "bool" .Values.peers.enabled }}
{{- if .Values.peers.enabled }}true{{ end }}
{{- else if and (include "entrepot.several" .) (not (include "entrepot.isDaemonSet" .)) }}true{{ end }}
{{- end }}

{{- define "entrepot.containerd" -}}
{{- if kindIs "bool" .Values.containerd.enabled }}
{{- if .Values.containerd.enabled }}true{{ end }}
{{- else }}
{{- include "entrepot.isDaemonSet" . }}
{{- end }}
{{- end }}

{{- define "entrepot.budget" -}}
{{- if kindIs "bool" .Values.podDisruptionBudget.enabled }}
{{- if .Values.podDisruptionBudget.enabled }}true{{ end }}
{{- else if and (include "entrepot.several" .) (not (include "entrepot.isDaemonSet" .)) }}true{{ end }}
{{- end }}

{{/* Whether each server has a volume that Kubernetes bounds; else the cache is on the disk of the node. */}}
{{- define "entrepot.hasVolume" -}}
{{- if or (eq .Values.mode "StatefulSet") .Values.storage.ephemeralClaim .Values.storage.existingClaim }}true{{ end }}
{{- end }}

{{/* Nine tenths of storage.size, in MiB. */}}
{{- define "entrepot.cacheLimit" -}}
{{- $number := regexFind "^[0-9]+" .Values.storage.size | int64 }}
{{- $units := dict "Mi" 1 "Gi" 1024 "Ti" 1048576 }}
{{- $factor := get $units (regexFind "[MGT]i$" .Values.storage.size) | int64 }}
{{- printf "%dMiB" (div (mul $number $factor 9) 10) }}
{{- end }}

{{- define "entrepot.config" -}}
{{- $disk := dict "path" "/var/lib/entrepot" "cache_limit" (include "entrepot.cacheLimit" .) }}
{{- if not (include "entrepot.hasVolume" .) }}
{{- /* More than the kubelet wants to have free, which else evicts pods of the node. */}}
{{- $_ := set $disk "min_free" "20%" }}
{{- end }}
{{- $made := dict "listen" ":5000" "admin" ":5001" "disk" $disk }}
{{- if .Values.tls.secretName }}
{{- $_ := set $made "tls" (dict "certificate" "/etc/entrepot/tls/tls.crt" "key" "/etc/entrepot/tls/tls.key") }}
{{- end }}
{{- if include "entrepot.peers" . }}
{{- $dns := printf "%s-peers.%s.svc:5000" (include "entrepot.fullname" .) .Release.Namespace }}
{{- $_ := set $made "peers" (dict "dns" $dns "secret" "${PEERS_SECRET}") }}
{{- end }}
{{- mustMergeOverwrite $made (deepCopy .Values.config) | toYaml }}
{{- end }}

{{- define "entrepot.adminSecret" -}}
{{- .Values.adminToken.existingSecret | default (include "entrepot.fullname" .) }}
{{- end }}

{{- define "entrepot.peersSecret" -}}
{{- .Values.peers.existingSecret | default (include "entrepot.fullname" .) }}
{{- end }}

{{/* The server as nodes reach it. */}}
{{- define "entrepot.nodeURL" -}}
{{- $scheme := include "entrepot.scheme" . }}
{{- if .Values.containerd.url }}
{{- .Values.containerd.url }}
{{- else if include "entrepot.isDaemonSet" . }}
{{- printf "%s://$(NODE_IP):%d" $scheme (int .Values.hostPort) }}
{{- else if .Values.service.nodePort }}
{{- printf "%s://$(NODE_IP):%d" $scheme (int .Values.service.nodePort) }}
{{- else }}
{{- fail "containerd.enabled: nodes cannot resolve the names of services: set service.type=NodePort and service.nodePort, or containerd.url to an address that nodes reach" }}
{{- end }}
{{- end }}

{{/* What would lose content, or not work, and no schema can say. */}}
{{- define "entrepot.check" -}}
{{- $shared := .Values.config.shared | default dict }}
{{- $ports := list }}
{{- range .Values.extraPorts }}
{{- $ports = append $ports (toString .port) }}
{{- end }}
{{- range $name, $namespace := .Values.config.namespaces | default dict }}
{{- if and (kindIs "map" $namespace) $namespace.listen }}
{{- $port := regexFind "[0-9]+$" (toString $namespace.listen) }}
{{- if not (has $port $ports) }}
{{- fail (printf "config.namespaces.%s.listen: nobody reaches port %s: add it to extraPorts" $name $port) }}
{{- end }}
{{- end }}
{{- if and (kindIs "map" $namespace) (hasKey $namespace "store") }}
{{- $one := and (eq $.Values.mode "StatefulSet") (not (include "entrepot.several" $)) }}
{{- if not (or $one (and $shared.bucket $shared.records)) }}
{{- fail (printf "config.namespaces.%s is a private registry: what is pushed needs one volume (mode StatefulSet with one replica), or a bucket and a database (config.shared.bucket and config.shared.records)" $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .Values.storage.existingClaim (or (include "entrepot.several" .) (ne .Values.mode "StatefulSet")) }}
{{- fail "storage.existingClaim is for a single server: use mode StatefulSet with one replica" }}
{{- end }}
{{- if and .Values.storage.hostPath (not (include "entrepot.isDaemonSet" .)) }}
{{- fail "storage.hostPath is for mode DaemonSet: other pods move between nodes" }}
{{- end }}
{{- if and .Values.hostNetwork (not (include "entrepot.isDaemonSet" .)) }}
{{- fail "hostNetwork is for mode DaemonSet" }}
{{- end }}
{{- if and .Values.hostNetwork (ne (int .Values.hostPort) 5000) }}
{{- fail "hostNetwork: the server has port 5000 of the node; leave hostPort at 5000" }}
{{- end }}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") }}
{{- fail "service.nodePort needs service.type NodePort or LoadBalancer" }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
{{- fail "ingress.host: set the name by which clients reach the server" }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.parentRefs: name the gateway" }}
{{- end }}
{{- end }}

{{- define "entrepot.notes" -}}
{{- $name := include "entrepot.fullname" . }}
{{- $scheme := include "entrepot.scheme" . }}
Entrepôt {{ .Chart.AppVersion }} is installed as {{ .Values.mode }} {{ $name }} in namespace {{ .Release.Namespace }}.

1. Wait until it serves:
   kubectl -n {{ .Release.Namespace }} rollout status {{ .Values.mode | lower }}/{{ $name }}
2. Pull an image through it:
   helm test {{ .Release.Name }} -n {{ .Release.Namespace }} --logs
3. See what it does:
   kubectl -n {{ .Release.Namespace }} exec {{ .Values.mode | lower }}/{{ $name }} -c entrepot -- entrepot stats
   kubectl -n {{ .Release.Namespace }} port-forward service/{{ $name }}-admin 5001, then open {{ $scheme }}://localhost:5001/
   {{- if .Values.adminToken.existingSecret }}
   The token is in secret {{ .Values.adminToken.existingSecret }}, key {{ .Values.adminToken.key }}.
   {{- else }}
   with the token of: kubectl -n {{ .Release.Namespace }} get secret {{ $name }} -o jsonpath='{.data.{{ .Values.adminToken.key }}}' | base64 -d
   {{- end }}
{{ if include "entrepot.containerd" . }}
containerd on each node pulls through {{ include "entrepot.nodeURL" . }} while it answers. If pulls do not come through, this says why:
   kubectl -n {{ .Release.Namespace }} logs daemonset/{{ $name }}{{ if not (include "entrepot.isDaemonSet" .) }}-nodes{{ end }} -c containerd
{{- if not (include "entrepot.isDaemonSet" .) }}
Once the release is uninstalled, nodes pull from the registries again.
{{- end }}
{{- else }}
Nodes do not pull through it yet. Set containerd.enabled, or configure them by `entrepot setup`: docs/clients.md.
{{- end }}
{{- if ne .Values.mode "StatefulSet" }}
{{- if not (or .Values.storage.ephemeralClaim .Values.storage.hostPath) }}
The cache of each pod is on the disk of its node, and goes with the pod.
{{- end }}
{{- end }}
{{- if not .Values.tls.secretName }}
Clients reach it by plain HTTP. With tls.secretName it speaks HTTPS.
{{- end }}
{{- end }}

{{/* The template of a server's pod. */}}
{{- define "entrepot.pod" -}}
metadata:
  labels:
    {{- include "entrepot.server" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: entrepot
    checksum/config: {{ include "entrepot.config" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "entrepot.serviceAccount" . }}
  automountServiceAccountToken: {{ .Values.serviceAccount.automountToken }}
  {{- /* Variables such as ENTREPOT_PORT would look like settings. */}}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- if .Values.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with include "entrepot.scheduling" . }}
  {{- . | trim | nindent 2 }}
  {{- end }}
  {{- if not (include "entrepot.isDaemonSet" .) }}
  {{- if kindIs "slice" .Values.topologySpreadConstraints }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- else if include "entrepot.several" . }}
  topologySpreadConstraints:
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "entrepot.server" $ | nindent 10 }}
    {{- end }}
  {{- end }}
  {{- end }}
  containers:
    - name: entrepot
      image: {{ include "entrepot.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve]
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      env:
        {{- include "entrepot.environment" . | nindent 8 }}
      ports:
        - name: registry
          containerPort: 5000
          {{- if include "entrepot.isDaemonSet" . }}
          hostPort: {{ .Values.hostPort }}
          {{- end }}
        - name: admin
          containerPort: 5001
        {{- range .Values.extraPorts }}
        - name: {{ .name }}
          containerPort: {{ .port }}
        {{- end }}
      {{- range $probe, $path := dict "startupProbe" "/healthz" "livenessProbe" "/healthz" "readinessProbe" "/readyz" }}
      {{ $probe }}:
        httpGet:
          path: {{ $path }}
          port: admin
          scheme: {{ include "entrepot.scheme" $ | upper }}
        {{- toYaml (get $.Values $probe) | nindent 8 }}
      {{- end }}
      {{- if and .Values.preStopSeconds (semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version) }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ .Values.preStopSeconds }}
      {{- end }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - name: data
          mountPath: /var/lib/entrepot
        - name: config
          mountPath: /etc/entrepot/config
          readOnly: true
        - name: tmp
          mountPath: /tmp
        {{- if .Values.tls.secretName }}
        - name: tls
          mountPath: /etc/entrepot/tls
          readOnly: true
        {{- end }}
        {{- range $index, $name := .Values.secretMounts }}
        - name: secret-{{ $index }}
          mountPath: /etc/entrepot/secrets/{{ $name }}
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- if and (include "entrepot.isDaemonSet" .) (include "entrepot.containerd" .) }}
    {{- include "entrepot.containerdContainer" . | nindent 4 }}
    {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "entrepot.fullname" . }}
    - name: tmp
      emptyDir: {}
    {{- if .Values.tls.secretName }}
    - name: tls
      secret:
        secretName: {{ .Values.tls.secretName }}
    {{- end }}
    {{- range $index, $name := .Values.secretMounts }}
    - name: secret-{{ $index }}
      secret:
        secretName: {{ $name }}
    {{- end }}
    {{- if .Values.storage.existingClaim }}
    - name: data
      persistentVolumeClaim:
        claimName: {{ .Values.storage.existingClaim }}
    {{- else if .Values.storage.hostPath }}
    - name: data
      hostPath:
        path: {{ .Values.storage.hostPath }}
        type: DirectoryOrCreate
    {{- else if ne .Values.mode "StatefulSet" }}
    - name: data
      {{- if .Values.storage.ephemeralClaim }}
      ephemeral:
        volumeClaimTemplate:
          spec:
            {{- include "entrepot.claim" . | nindent 12 }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- end }}
    {{- if and (include "entrepot.isDaemonSet" .) (include "entrepot.containerd" .) }}
    {{- include "entrepot.containerdVolumes" . | nindent 4 }}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "entrepot.scheduling" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if kindIs "slice" .Values.tolerations }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- else if include "entrepot.isDaemonSet" . }}
tolerations:
  - operator: Exists
{{- end }}
{{- end }}

{{- define "entrepot.environment" -}}
- name: ENTREPOT_CONFIG
  value: /etc/entrepot/config/entrepot.yml
- name: ENTREPOT_ADMIN_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "entrepot.adminSecret" . }}
      key: {{ .Values.adminToken.key }}
{{- if include "entrepot.peers" . }}
- name: PEERS_SECRET
  valueFrom:
    secretKeyRef:
      name: {{ include "entrepot.peersSecret" . }}
      key: {{ .Values.peers.key }}
{{- end }}
{{- range $name, $from := .Values.secretEnv }}
- name: {{ $name }}
  valueFrom:
    secretKeyRef:
      name: {{ $from.secret }}
      key: {{ $from.key }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "entrepot.claim" -}}
accessModes:
  {{- toYaml .Values.storage.accessModes | nindent 2 }}
{{- with .Values.storage.storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .Values.storage.size }}
{{- end }}

{{/* It writes hosts.toml while the server answers, and takes it out at its end. */}}
{{- define "entrepot.containerdContainer" -}}
- name: containerd
  image: {{ include "entrepot.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args:
    - setup
    - containerd
    - --while-serving
    - --root=/host
    - --url={{ include "entrepot.nodeURL" . }}
    {{- range .Values.containerd.namespaces }}
    - --namespace={{ . }}
    {{- end }}
    {{- if .Values.tls.caKey }}
    - --ca-file=/etc/entrepot/authority/ca.crt
    {{- end }}
  env:
    - name: NODE_IP
      valueFrom:
        fieldRef:
          fieldPath: status.hostIP
  securityContext:
    {{- toYaml .Values.containerd.securityContext | nindent 4 }}
  resources:
    {{- toYaml .Values.containerd.resources | nindent 4 }}
  volumeMounts:
    - name: containerd
      mountPath: /host/etc/containerd
      readOnly: true
    - name: certs
      mountPath: /host/etc/containerd/certs.d
    {{- if .Values.tls.caKey }}
    - name: authority
      mountPath: /etc/entrepot/authority
      readOnly: true
    {{- end }}
{{- end }}

{{- define "entrepot.containerdVolumes" -}}
- name: containerd
  hostPath:
    path: {{ .Values.containerd.directory }}
    type: DirectoryOrCreate
- name: certs
  hostPath:
    path: {{ .Values.containerd.directory }}/certs.d
    type: DirectoryOrCreate
{{- include "entrepot.authority" . }}
{{- end }}

{{- define "entrepot.authority" -}}
{{- if .Values.tls.caKey }}
- name: authority
  secret:
    secretName: {{ .Values.tls.secretName }}
    items:
      - key: {{ .Values.tls.caKey }}
        path: ca.crt
{{- end }}
{{- end }}

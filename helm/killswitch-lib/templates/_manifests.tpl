{{/* All that stands beside the guarded workloads of a chart: configuration, rules, the claim, the monitor. */}}
{{- define "killswitch.manifests" -}}
{{- include "killswitch.checkValues" . -}}
{{- if .Values.killswitch.enabled -}}
{{- include "killswitch.config" . }}
{{- include "killswitch.claim" . }}
{{- include "killswitch.service" . }}
{{- include "killswitch.podMonitor" . }}
{{- end -}}
{{- end }}

{{- define "killswitch.claim" -}}
{{- $state := .Values.killswitch.state -}}
{{- if and (eq $state.volume "persistentVolumeClaim") (not $state.existingClaim) }}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "killswitch.claimName" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "killswitch.labels" . | nindent 4 }}
  annotations:
    # The switch's memory and its audit outlive the release.
    helm.sh/resource-policy: keep
spec:
  {{- include "killswitch.claimSpec" . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A headless Service in front of the operations ports of the guarded pods of this release. */}}
{{- define "killswitch.service" -}}
{{- $v := .Values.killswitch -}}
{{- if $v.service.enabled }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ include "killswitch.serviceName" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "killswitch.labels" . | nindent 4 }}
    app.kubernetes.io/component: operations
spec:
  clusterIP: None
  # A switch that is not ready yet is one to look at, and to stop.
  publishNotReadyAddresses: true
  selector:
    {{- include "killswitch.selectorLabels" . | nindent 4 }}
  ports:
    # By number: not every Kubernetes resolves the name of a native sidecar's port.
    - {name: killswitch-ops, port: {{ int $v.operations.port }}, targetPort: {{ int $v.operations.port }}, protocol: TCP}
{{- end }}
{{- end }}

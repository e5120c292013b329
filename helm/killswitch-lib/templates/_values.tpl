{{/* The version of sidecar and charts: in a chart that depends on this one, .Chart is that chart's. */}}
{{- define "killswitch.version" -}}{{ .Subcharts.killswitch.Chart.AppVersion }}{{- end }}

{{- define "killswitch.defaultRules" -}}{{ .Subcharts.killswitch.Files.Get "files/default.yaml" }}{{- end }}

{{/* Refuses what no later template could make sense of. */}}
{{- define "killswitch.checkValues" -}}
{{- if not (and (kindIs "map" .Values.killswitch) (hasKey .Values.killswitch "lingerSeconds")) -}}
{{- fail "killswitch: the values of killswitch-lib are not under `killswitch`; in Chart.yaml give that dependency `alias: killswitch`" -}}
{{- end -}}
{{- $v := .Values.killswitch -}}
{{- if and (not $v.existingRulesConfigMap) (not $v.defaultRules) (not (include "killswitch.rules" . | fromYaml)) -}}
{{- fail "killswitch: there is no rule, so the gate would deny every order; set killswitch.rules, killswitch.defaultRules or killswitch.existingRulesConfigMap" -}}
{{- end -}}
{{- if and $v.webConfig.certificateSecretName (not $v.webConfig.secretName) -}}
{{- fail "killswitch: killswitch.webConfig.certificateSecretName is a certificate that no web.yaml names; set killswitch.webConfig.secretName" -}}
{{- end -}}
{{- range $kind := list "approvers" "approvalCode" "tokens" "webhookToken" -}}
{{- if and (index $v $kind "secretName") (not (index $v $kind "key")) -}}
{{- fail (printf "killswitch: killswitch.%s.key is empty; name the key of the Secret %q" $kind (index $v $kind "secretName")) -}}
{{- end -}}
{{- end -}}
{{- include "killswitch.checkProxy" . -}}
{{- end }}

{{- define "killswitch.fullname" -}}
{{- $v := .Values.killswitch -}}
{{- if $v.fullnameOverride -}}
{{- $v.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains "killswitch" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-killswitch" (.Release.Name | trunc 39 | trimSuffix "-") -}}
{{- end -}}
{{- end }}

{{- define "killswitch.configMapName" -}}
{{- .Values.killswitch.existingConfigMap | default (printf "%s-config" (include "killswitch.fullname" .)) -}}
{{- end }}

{{- define "killswitch.rulesConfigMapName" -}}
{{- .Values.killswitch.existingRulesConfigMap | default (printf "%s-rules" (include "killswitch.fullname" .)) -}}
{{- end }}

{{- define "killswitch.claimName" -}}
{{- .Values.killswitch.state.existingClaim | default (printf "%s-state" (include "killswitch.fullname" .)) -}}
{{- end }}

{{- define "killswitch.serviceName" -}}
{{- printf "%s-operations" (include "killswitch.fullname" .) -}}
{{- end }}

{{- define "killswitch.image" -}}
{{- $image := .Values.killswitch.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository ($image.tag | default (include "killswitch.version" .)) -}}
{{- end -}}
{{- end }}

{{/* "native" or "container". */}}
{{- define "killswitch.placement" -}}
{{- $wanted := .Values.killswitch.placement -}}
{{- $able := semverCompare ">=1.29-0" .Capabilities.KubeVersion.Version -}}
{{- if and (eq $wanted "native") (semverCompare "<1.28-0" .Capabilities.KubeVersion.Version) -}}
{{- /* There it would be an init container that never ends, and the bot would never start. */ -}}
{{- fail (printf "killswitch: killswitch.placement is native, which needs Kubernetes 1.29 (1.28 with a feature gate), and this cluster is %s; use auto or container" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if eq $wanted "auto" -}}{{- ternary "native" "container" $able -}}{{- else -}}{{- $wanted -}}{{- end -}}
{{- end }}

{{/* "true" where a kind of the Prometheus operator is wanted. Arguments: the root, and true, false or auto. */}}
{{- define "killswitch.monitoringWanted" -}}
{{- $root := index . 0 -}}
{{- $wanted := index . 1 -}}
{{- $known := or ($root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1") ($root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1/PodMonitor") -}}
{{- if eq (toString $wanted) "auto" -}}{{- if $known -}}true{{- end -}}{{- else if $wanted -}}true{{- end -}}
{{- end }}

{{/* Where probes and Prometheus find the operations port. */}}
{{- define "killswitch.scheme" -}}
{{- with .Values.killswitch.webConfig -}}{{- ternary "https" "http" (and (ne .secretName "") .tls) -}}{{- end -}}
{{- end }}

{{- define "killswitch.healthIsApart" -}}
{{- with .Values.killswitch.webConfig -}}{{- if and .secretName .clientCertificates -}}true{{- end -}}{{- end -}}
{{- end }}

{{- define "killswitch.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: killswitch
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ include "killswitch.version" . | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: killswitch
{{- end }}
